import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.whisper import diarization_models
from cesar_mqtt.whisper.diarization import DiarizationError
from cesar_mqtt.whisper.hub import HubFile
from tests.unit.whisper.fake_hub import COMMIT, FakeHub, point_to, running_hub

_CONTENT = {"model.onnx": b"who speaks when", "voice.onnx": b"whose voice it is"}


def _file(repository: str, name: str) -> HubFile:
    content = _CONTENT[name]
    return HubFile(repository, COMMIT, name, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(diarization_models, "SEGMENTATION", _file("someone/segmentation", "model.onnx"))
    monkeypatch.setattr(diarization_models, "EMBEDDING", _file("someone/voices", "voice.onnx"))
    with running_hub() as fake:
        fake.files = fake.files | _CONTENT
        point_to(fake.endpoint, tmp_path / "hub", monkeypatch)
        yield fake


def test_the_models_are_downloaded_once_and_found_without_network_then(fake_hub: FakeHub) -> None:
    settings = ModelSettings()
    assert diarization_models.find(settings) is None
    done: list[tuple[int, int]] = []
    models = diarization_models.obtain(settings, on_progress=lambda *bytes_: done.append(bytes_))
    assert models.origin == "cache"
    assert models.segmentation.read_bytes() == _CONTENT["model.onnx"]
    assert models.embedding.read_bytes() == _CONTENT["voice.onnx"]
    assert models.size_bytes == 32
    assert done[-1] == (32, 32)
    asked = len(fake_hub.requests)
    assert diarization_models.obtain(ModelSettings(download=False)) == models
    assert len(fake_hub.requests) == asked
    assert not fake_hub.bodies("model.bin")


def test_what_is_not_the_known_file_is_removed(fake_hub: FakeHub) -> None:
    fake_hub.files = fake_hub.files | {"voice.onnx": b"whose voice it was"}
    with pytest.raises(DiarizationError, match=r"voice\.onnx of someone/voices is not the known file\. It was removed"):
        diarization_models.obtain(ModelSettings())
    assert diarization_models.find(ModelSettings()) is None
    fake_hub.files = fake_hub.files | _CONTENT
    assert diarization_models.obtain(ModelSettings()).embedding.read_bytes() == _CONTENT["voice.onnx"]


def test_a_hub_that_refuses_is_told_in_a_sentence(fake_hub: FakeHub) -> None:
    fake_hub.status = 404
    with pytest.raises(
        DiarizationError, match=r"^The speakers cannot be told apart: The model 'diarization' .* refuses"
    ):
        diarization_models.obtain(ModelSettings())
    with pytest.raises(DiarizationError, match=r"may not be downloaded\. Put segmentation\.onnx and embedding\.onnx"):
        diarization_models.obtain(ModelSettings(download=False))


def test_a_folder_of_the_settings_comes_first(tmp_path: Path, fake_hub: FakeHub) -> None:
    folder = tmp_path / "models" / "diarization"
    folder.mkdir(parents=True)
    settings = ModelSettings(directory=tmp_path / "models")
    (folder / "segmentation.onnx").write_bytes(b"1")
    assert diarization_models.find(settings) is None
    (folder / "embedding.onnx").write_bytes(b"2")
    models = diarization_models.obtain(settings)
    assert (models.origin, models.segmentation, models.embedding) == (
        "folder",
        folder / "segmentation.onnx",
        folder / "embedding.onnx",
    )
    assert fake_hub.requests == []
