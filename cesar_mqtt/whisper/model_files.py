"""The folder of one Whisper model in CTranslate2's format: which files it needs, and checks without loading it.

No state; any thread may call it. Also the errors of jobs whose model cannot be had.
"""

import json
import struct
from pathlib import Path
from typing import BinaryIO

from cesar_mqtt.errors import ErrorCode, JobFailedError

PATTERNS = ("config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*")
"""The files that faster-whisper reads, of the many that a repository of the hub may have."""

_MULTILINGUAL_WORDS = 51_865
"""The least size of a vocabulary that CTranslate2 takes for multilingual (src/models/whisper.cc)."""
_CONFIG_KEYS = frozenset({"suppress_ids", "suppress_ids_begin"})
_BINARY_VERSION = 6
_EMBEDDINGS = "decoder/embeddings/weight"


def missing_files(path: Path) -> list[str]:
    """Name the required files that this folder lacks.

    Without `tokenizer.json` faster-whisper would request one from the hub, and wait for it.
    """
    missing = [name for name in ("config.json", "model.bin", "tokenizer.json") if not (path / name).is_file()]
    if not any(path.glob("vocabulary.*")):
        missing.append("vocabulary.json")
    return missing


def size_bytes(path: Path) -> int:
    """The size of the model's files, following links (the hub's cache consists of them)."""
    return sum(file.stat().st_size for pattern in PATTERNS for file in path.glob(pattern) if file.is_file())


def is_multilingual(path: Path) -> bool | None:
    """Whether CTranslate2 will call the model in a folder multilingual; None: its files do not show it."""
    try:
        return count_words(path) >= _MULTILINGUAL_WORDS
    except (OSError, ValueError):
        return None


def check(path: Path) -> None:
    """Reject a model whose files do not belong together, before it is loaded.

    CTranslate2 does not compare them: more words than the weights have rows ended the process, fewer gave nonsense. Its
    own converter always writes one word for each row of the decoder's embeddings. A key that config.json lacks is
    looked up all the same, in memory that holds anything.

    Raises:
        ValueError: config.json is not that of a Whisper model, or the vocabulary is not this model's.
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
    """The size of the vocabulary, from the file that CTranslate2 would read. Raises OSError, ValueError."""
    listed = path / "vocabulary.json"
    if listed.is_file():
        words = json.loads(listed.read_bytes())
        if not isinstance(words, list):
            raise ValueError("vocabulary.json is not a list")
        return len(words)
    lines = (path / "vocabulary.txt").read_bytes().split(b"\n")
    return len(lines) if lines[-1] else len(lines) - 1


def unavailable(message: str) -> JobFailedError:
    """The error of a job whose model cannot be had."""
    return JobFailedError(ErrorCode.MODEL_UNAVAILABLE, message)


def unusable(name: str, reason: str) -> JobFailedError:
    """The error of a job whose model is on this machine and broken."""
    return unavailable(
        f"The model {name!r} cannot be used, {reason}: remove it and fetch it again, or choose another model."
    )


def _embedding_rows(file: BinaryIO) -> int | None:
    """Read the rows of the decoder's embeddings from a `model.bin`; None: it is cut short, or has another layout.

    The layout of CTranslate2's `ModelSpec._serialize`: the name, shape, type and length of each variable before its
    data, in alphabetical order, so that little has to be read.
    """
    try:
        (version,) = _read(file, "<I")
        if version != _BINARY_VERSION:
            return None
        _read_string(file)
        _revision, variables = _read(file, "<II")
        for _ in range(variables):
            name, (rank,) = _read_string(file), _read(file, "<B")
            shape = _read(file, f"<{rank}I")
            _kind, length = _read(file, "<BI")
            if name == _EMBEDDINGS:
                return int(shape[0])
            file.seek(length, 1)
    except (struct.error, IndexError):
        return None
    return None


def _read(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _read_string(file: BinaryIO) -> str:
    (length,) = _read(file, "<H")
    return file.read(length).rstrip(b"\0").decode("utf-8", "replace")
