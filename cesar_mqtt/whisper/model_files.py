"""The folder of one Whisper model in CTranslate2's format: what has to be in it, and what can be told without loading.

Pure reading, no state; any thread may call it. Also the two sentences that every module about models ends in.
"""

import json
import struct
from pathlib import Path
from typing import BinaryIO

from cesar_mqtt.errors import ErrorCode, JobFailedError

PATTERNS = ("config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*")
"""Every file that faster-whisper reads, of the many that a repository of the hub may hold."""

_MULTILINGUAL_WORDS = 51_865
"""From so many on CTranslate2 calls a Whisper model multilingual (src/models/whisper.cc)."""
_CONFIG_KEYS = frozenset({"suppress_ids", "suppress_ids_begin"})
_BINARY_VERSION = 6
_EMBEDDINGS = "decoder/embeddings/weight"


def missing_files(path: Path) -> list[str]:
    """Name the files that a model cannot do without and this folder lacks.

    Without `tokenizer.json` faster-whisper would ask the hub for one, and wait for it.
    """
    missing = [name for name in ("config.json", "model.bin", "tokenizer.json") if not (path / name).is_file()]
    if not any(path.glob("vocabulary.*")):
        missing.append("vocabulary.json")
    return missing


def size_bytes(path: Path) -> int:
    """Add up the model's files, following links (the hub's cache consists of them)."""
    return sum(file.stat().st_size for pattern in PATTERNS for file in path.glob(pattern) if file.is_file())


def is_multilingual(path: Path) -> bool | None:
    """Whether the model in a folder knows more than English, as CTranslate2 will say; None: the files do not tell."""
    try:
        return count_words(path) >= _MULTILINGUAL_WORDS
    except (OSError, ValueError):
        return None


def check(path: Path) -> None:
    """Refuse a model whose parts do not belong together, before it is loaded.

    CTranslate2 does not compare them: with too many words for its weights it was seen to end the process, with too few
    to write nonsense. Its own converter never writes other than one word for each row of the decoder's embeddings. A
    key that its configuration lacks it looks up all the same, and finds whatever is in memory.

    Raises:
        ValueError: the configuration is not one of a Whisper model, or the vocabulary not this model's.
        OSError: a file cannot be read.
    """
    config = json.loads((path / "config.json").read_bytes())
    if not isinstance(config, dict) or not config.keys() >= _CONFIG_KEYS:
        raise ValueError("its config.json is not that of a Whisper model")
    words = count_words(path)
    with (path / "model.bin").open("rb") as file:
        rows = _embedding_rows(file)
    if rows is not None and rows != words:
        raise ValueError(f"its vocabulary has {words} words, its model.bin is for {rows}")


def count_words(path: Path) -> int:
    """Count the vocabulary, from the file that CTranslate2 would read. Raises OSError, ValueError."""
    listed = path / "vocabulary.json"
    if listed.is_file():
        words = json.loads(listed.read_bytes())
        if not isinstance(words, list):
            raise ValueError("vocabulary.json is not a list")
        return len(words)
    lines = (path / "vocabulary.txt").read_bytes().split(b"\n")
    return len(lines) if lines[-1] else len(lines) - 1


def unavailable(message: str) -> JobFailedError:
    """Make the error of a job whose model cannot be had."""
    return JobFailedError(ErrorCode.MODEL_UNAVAILABLE, message)


def unusable(name: str, reason: str) -> JobFailedError:
    """Make the error of a job whose model is here and broken."""
    return unavailable(
        f"The model {name!r} cannot be used, {reason}: remove it and fetch it again, or choose another model."
    )


def _embedding_rows(file: BinaryIO) -> int | None:
    """Read how many words a `model.bin` was made for; None: it is cut short, or of a version with another layout.

    The layout is that of CTranslate2's `ModelSpec._serialize`: every variable's name, shape, type and length before
    its data, in alphabetical order, so that little has to be read.
    """
    try:
        (version,) = _unpack(file, "<I")
        if version != _BINARY_VERSION:
            return None
        _string(file)
        _revision, variables = _unpack(file, "<II")
        for _ in range(variables):
            name, (rank,) = _string(file), _unpack(file, "<B")
            shape = _unpack(file, f"<{rank}I")
            _kind, length = _unpack(file, "<BI")
            if name == _EMBEDDINGS:
                return int(shape[0])
            file.seek(length, 1)
    except (struct.error, IndexError):
        return None
    return None


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<H")
    return file.read(length).rstrip(b"\0").decode("utf-8", "replace")
