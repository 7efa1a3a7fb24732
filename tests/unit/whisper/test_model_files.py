import json
import struct
from pathlib import Path

import pytest

from cesar_mqtt.whisper import model_files


def binary(rows: int, *, version: int = 6) -> bytes:
    """As much of CTranslate2's format as is read: two variables, the second of which tells the size."""
    content = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    content += text("decoder/activation") + struct.pack("<BBI", 0, 1, 1) + b"\7"
    return content + text("decoder/embeddings/weight") + struct.pack("<BIIBI", 2, rows, 4, 4, 0)


def text(content: str) -> bytes:
    return struct.pack("<H", len(content) + 1) + content.encode() + b"\0"


def make(folder: Path, *, words: int, model: bytes) -> Path:
    (folder / "config.json").write_text('{"suppress_ids": [], "suppress_ids_begin": [], "lang_ids": []}')
    (folder / "vocabulary.txt").write_text("word\n" * words)
    (folder / "model.bin").write_bytes(model)
    return folder


def test_a_vocabulary_that_belongs_to_the_model_passes(tmp_path: Path) -> None:
    model_files.check(make(tmp_path, words=5, model=binary(5)))


@pytest.mark.parametrize("words", [0, 4, 6])
def test_a_vocabulary_of_another_model_is_refused_before_it_can_do_harm(words: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{words} words, its model.bin is for 5"):
        model_files.check(make(tmp_path, words=words, model=binary(5)))


@pytest.mark.parametrize("model", [b"", b"\6", binary(5)[:30], binary(5)[:-20], binary(5, version=5), b"garbage" * 100])
def test_a_model_whose_size_cannot_be_read_is_left_to_ctranslate2(model: bytes, tmp_path: Path) -> None:
    model_files.check(make(tmp_path, words=9, model=model))


@pytest.mark.parametrize("config", ["{}", "[]", "null", '{"suppress_ids": []}', "{oh", ""])
def test_a_configuration_in_which_ctranslate2_would_look_in_vain_is_refused(config: str, tmp_path: Path) -> None:
    make(tmp_path, words=5, model=binary(5))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json|Expecting"):
        model_files.check(tmp_path)


def test_words_are_counted_in_either_form_of_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").write_text("a\nb\n\nc")
    assert model_files.count_words(tmp_path) == 4
    (tmp_path / "vocabulary.json").write_text(json.dumps(["a", "b"]))
    assert model_files.count_words(tmp_path) == 2


@pytest.mark.parametrize("content", ['{"a": 1}', "{oh", ""])
def test_a_vocabulary_that_is_no_list_is_a_value_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(ValueError, match=r"vocabulary|Expecting"):
        model_files.count_words(tmp_path)
    assert model_files.is_multilingual(tmp_path) is None


def test_only_a_models_own_files_count_for_its_size(tmp_path: Path) -> None:
    make(tmp_path, words=2, model=b"12345")
    (tmp_path / "README.md").write_text("not needed")
    assert model_files.size_bytes(tmp_path) == 15 + (tmp_path / "config.json").stat().st_size
