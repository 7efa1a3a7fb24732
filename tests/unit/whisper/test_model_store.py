import gc
import hashlib
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import Cancelled, ConfigError, ErrorCode, JobFailedError
from cesar_mqtt.whisper import catalogue, hub, model_store
from cesar_mqtt.whisper.model_store import ModelStore, is_out_of_memory
from cesar_mqtt.whisper.packages import Package, PackagedModels

CONTENT = '{"model": {}, "suppress_ids": [], "suppress_ids_begin": []}'
FILES = ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt")


@pytest.fixture(autouse=True)
def _nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model comes from the hub's cache of the user, and none from the hub."""
    monkeypatch.setattr(hub, "cached", lambda _: None)
    monkeypatch.setattr(hub, "is_offline", lambda: True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def make_model(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    for file in FILES:
        (path / file).write_text(CONTENT)
    return path


def failure(store: ModelStore, name: str) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        store.load(name)
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    assert repr(name) in caught.value.message
    return caught.value


# --- the one in memory


class FakeModel:
    """Stands in for WhisperModel; notes which others were alive when it was made."""

    alive: ClassVar[weakref.WeakSet["FakeModel"]] = weakref.WeakSet()
    crowds: ClassVar[list[int]]
    fails_with: BaseException | None = None

    def __init__(self, path: str, **arguments: Any) -> None:
        gc.collect()
        self.path = path
        self.model = SimpleNamespace(n_mels=80, generate=lambda *_, **__: [])
        self.hf_tokenizer = SimpleNamespace(token_to_id=len)
        self.arguments = arguments
        self.crowds.append(len(self.alive))
        self.alive.add(self)

    def encode(self, features: Any) -> SimpleNamespace:
        return SimpleNamespace(shape=(1, features.shape[1] // 2, 384))

    def transcribe(self, audio: Any, **_: Any) -> tuple[Iterator[object], None]:
        assert audio.shape == (16_000,)
        if self.fails_with is not None:
            raise self.fails_with
        return iter([object()]), None


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    monkeypatch.setattr(model_store, "WhisperModel", FakeModel)
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
def test_too_little_memory_is_distinguished_from_a_broken_model(
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
    settings = ModelSettings(directory=folder, device="cpu", compute_type="float32", cpu_threads=6, workers=2)
    arguments = ModelStore(settings).load("one").arguments
    assert arguments == {"device": "cpu", "compute_type": "float32", "num_workers": 2, "cpu_threads": 4}


@pytest.fixture
def parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package from which `base` has to be joined; returns its model.bin."""
    data = tmp_path / "site" / "store_base" / "data"
    data.mkdir(parents=True)
    for file in FILES:
        (data / file).write_text(CONTENT)
    package = Package(
        "store_base",
        "data",
        {file: hashlib.sha256(CONTENT.encode()).hexdigest() for file in FILES},
        parts=(("store_base", "data/model.bin"),),
        size_bytes=len(CONTENT),
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(catalogue, "PackagedModels", lambda folder: PackagedModels(folder, packages={"base": package}))
    return data / "model.bin"


@pytest.mark.usefixtures("parted")
def test_a_model_in_parts_is_joined_in_the_folder_of_the_store(folder: Path, fake_model: type[FakeModel]) -> None:
    store = ModelStore(ModelSettings(), folder=folder)
    assert list(folder.iterdir()) == [], "only when it is needed"
    assert Path(store.load("base").path).parent == folder
    assert len(fake_model.crowds) == 1


@pytest.mark.usefixtures("parted")
def test_a_joined_model_that_cannot_be_loaded_is_reported_as_damaged(
    folder: Path, fake_model: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_model, "fails_with", RuntimeError("nonsense"))
    assert "damaged" in failure(ModelStore(ModelSettings(), folder=folder), "base").message
    assert len(fake_model.crowds) == 1


@pytest.mark.usefixtures("parted", "fake_model")
def test_loading_can_be_stopped_while_the_model_is_fetched(folder: Path) -> None:
    store = ModelStore(ModelSettings(), folder=folder)
    with pytest.raises(Cancelled):
        store.load("base", should_stop=lambda: True)
    assert store.describe().loaded is None


def test_a_name_that_is_not_allowed_keeps_the_model_in_memory(folder: Path, fake_model: type[FakeModel]) -> None:
    make_model(folder, "one")
    store = ModelStore(ModelSettings(directory=folder))
    model = store.load("one")
    failure(store, "enormous")
    assert store.load("one") is model
    assert len(fake_model.crowds) == 1


# --- idling


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.usefixtures("fake_model")
def test_a_model_that_has_idled_long_enough_is_unloaded(folder: Path) -> None:
    make_model(folder, "one")
    clock = Clock()
    store = ModelStore(ModelSettings(directory=folder, idle_timeout=60), clock=clock)
    assert store.idle_deadline() is None, "nothing is loaded"
    model = store.load("one")
    gone = weakref.ref(model)
    del model
    assert store.idle_deadline() == 160.0
    clock.now = 150.0
    assert not store.unload_if_idle()
    store.mark_used()
    assert store.idle_deadline() == 210.0
    clock.now = 170.0
    assert store.load("one")
    assert store.idle_deadline() == 230.0, "another job"
    clock.now = 229.9
    assert not store.unload_if_idle()
    assert store.describe().loaded == "one"
    clock.now = 230.0
    assert store.unload_if_idle()
    assert gone() is None
    assert store.describe().loaded is None
    assert store.idle_deadline() is None
    assert not store.unload_if_idle()
    assert store.load("one")


@pytest.mark.usefixtures("fake_model")
def test_without_a_timeout_a_model_is_kept(folder: Path) -> None:
    make_model(folder, "one")
    clock = Clock()
    store = ModelStore(ModelSettings(directory=folder), clock=clock)
    store.load("one")
    clock.now = 1e9
    assert store.idle_deadline() is None
    assert not store.unload_if_idle()


@pytest.mark.usefixtures("fake_model")
def test_unloading_releases_memory_after_the_model_is_freed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(folder, "one")
    store = ModelStore(ModelSettings(directory=folder))
    gone = weakref.ref(store.load("one"))
    seen: list[object] = []
    monkeypatch.setattr(model_store, "release_memory", lambda: seen.append(gone()))
    store.unload()
    store.unload()
    assert seen == [None]


# --- what is said of them


@pytest.mark.usefixtures("fake_model")
def test_the_store_describes_itself(folder: Path) -> None:
    path = make_model(folder, "one")
    settings = ModelSettings(directory=folder, allowed=("one", "small"), device="cpu", cpu_threads=3)
    store = ModelStore(settings)
    store.load("one")
    told = store.describe()
    assert (told.allowed, told.default, told.loaded) == (("one", "small"), "one", "one")
    assert (told.device, told.compute_type, told.cpu_threads) == ("cpu", "int8", 3)
    assert [(entry.name, entry.path) for entry in told.models] == [("one", path), ("small", None)]
    assert store.is_multilingual("one") is False
    assert store.is_multilingual("small") is True
    assert store.is_multilingual("two") is None


# --- device and precision


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
    monkeypatch.setattr(model_store, "ctranslate2", machine(cuda))
    store = ModelStore(ModelSettings(device=device, compute_type=compute_type))
    assert (store.device, store.compute_type) == chosen


def test_a_precision_that_the_device_does_not_have_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "ctranslate2", machine(None))
    with pytest.raises(ConfigError, match=r"models\.compute_type.*'float16'.*float32, int8, int8_float32"):
        ModelStore(ModelSettings(compute_type="float16"))


def test_a_device_that_is_not_there_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "ctranslate2", machine(None))
    with pytest.raises(ConfigError, match=r"models\.device.*'cuda'"):
        ModelStore(ModelSettings(device="cuda"))


def test_the_real_ctranslate2_answers_as_the_stand_in_does() -> None:
    store = ModelStore(ModelSettings(device="cpu"))
    assert (store.device, store.compute_type) == ("cpu", "int8")
    assert 1 <= store.cpu_threads <= (os.cpu_count() or 1)
