"""The two models of the diarizer: where they are on this machine, and how they are fetched.

Like a Whisper model, they are looked up in the configured folder, then in the Hugging Face cache, and last on the hub.
Any thread may call.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import JobFailedError
from cesar_mqtt.threads import never_stop
from cesar_mqtt.whisper import hub
from cesar_mqtt.whisper.diarization import Diarizer
from cesar_mqtt.whisper.hub import HubFile
from cesar_mqtt.whisper.onnx_models import EMBEDDING_FILE, SEGMENTATION_FILE, DiarizationError

NAME = "diarization"
"""What commands call both models together, and their folder in `models.directory`."""

SEGMENTATION = HubFile(
    "csukuangfj/sherpa-onnx-pyannote-segmentation-3-0",
    "9403a6902bb58e3d5ae8c7e77c3422de279db2e0",
    "model.onnx",
    "220ad67ca923bef2fa91f2390c786097bf305bceb5e261d4af67b38e938e1079",
    5_992_913,
)
"""pyannote's segmentation-3.0 (MIT, Copyright 2022 CNRS), as sherpa-onnx publishes it."""
EMBEDDING = HubFile(
    "csukuangfj/speaker-embedding-models",
    "0743f301363dec56491a490f6d6cbc9d67f9a3bf",
    "3dspeaker_speech_campplus_sv_zh_en_16k-common_advanced.onnx",
    "aa3cfc16963a10586a9393f5035d6d6b57e98d358b347f80c2a30bf4f00ceba2",
    28_281_164,
)
"""CAM++ of 3D-Speaker (Apache-2.0), for Chinese and English and good for others, as sherpa-onnx publishes it."""


@dataclass(frozen=True, slots=True)
class DiarizationModels:
    """Where both models are.

    Attributes:
        origin: `folder`: in `models.directory`; `cache`: in the cache of the hub.
    """

    origin: Literal["folder", "cache"]
    segmentation: Path
    embedding: Path

    @property
    def size_bytes(self) -> int:
        return self.segmentation.stat().st_size + self.embedding.stat().st_size


def find(settings: ModelSettings) -> DiarizationModels | None:
    """Look for the models on this machine, without network; None: at least one is not here."""
    if settings.directory is not None:
        folder = settings.directory / NAME
        segmentation, embedding = folder / SEGMENTATION_FILE, folder / EMBEDDING_FILE
        if segmentation.is_file() and embedding.is_file():
            return DiarizationModels("folder", segmentation, embedding)
    cached = hub.cached_file(SEGMENTATION), hub.cached_file(EMBEDDING)
    return None if cached[0] is None or cached[1] is None else DiarizationModels("cache", cached[0], cached[1])


def obtain(
    settings: ModelSettings,
    *,
    should_stop: Callable[[], bool] = never_stop,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> DiarizationModels:
    """Return where the models are, after downloading them where that is needed.

    Args:
        settings: the `models` section.
        should_stop: asked several times a second during a download.
        on_progress: called with the bytes done and the bytes in all during a download.

    Raises:
        DiarizationError: they are not on this machine and cannot be fetched, or what was fetched is not what is known.
        Cancelled: `should_stop` returned True.
    """
    found = find(settings)
    if found is not None:
        return found
    if not settings.download:
        raise DiarizationError(
            "The speakers cannot be told apart: the models for it are not on this machine, and may not be downloaded.",
            f"Put {SEGMENTATION_FILE} and {EMBEDDING_FILE} into {NAME}/ in `models.directory`.",
        )
    total_bytes = SEGMENTATION.size_bytes + EMBEDDING.size_bytes
    paths = []
    before = 0
    for file in (SEGMENTATION, EMBEDDING):
        report = partial(_report, on_progress, before, total_bytes)
        try:
            path = hub.cached_file(file) or hub.download_file(file, NAME, should_stop=should_stop, on_progress=report)
        except JobFailedError as exc:
            raise DiarizationError(f"The speakers cannot be told apart: {exc.message}") from exc
        _check(file, path)
        paths.append(path)
        before += file.size_bytes
    return DiarizationModels("cache", paths[0], paths[1])


def load(settings: ModelSettings, *, should_stop: Callable[[], bool] = never_stop) -> Diarizer:
    """Load the models, after downloading them where that is needed.

    Raises:
        DiarizationError: as `obtain`, or a file is damaged.
        Cancelled: `should_stop` returned True.
    """
    models = obtain(settings, should_stop=should_stop)
    return Diarizer(models.segmentation, models.embedding)


def _report(on_progress: Callable[[int, int], None], before: int, total: int, done: int, _of_file: int) -> None:
    on_progress(before + done, total)


def _check(file: HubFile, path: Path) -> None:
    """Reject, and remove, what is not the known file. Raises DiarizationError."""
    with path.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != file.sha256:
        path.resolve().unlink()
        path.unlink()
        raise DiarizationError(
            f"The speakers cannot be told apart: {file.name} of {file.repository} is not the known file.",
            "It was removed; retry, and check HF_ENDPOINT if you have set it.",
        )
