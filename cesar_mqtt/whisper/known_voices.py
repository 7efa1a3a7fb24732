"""Names for speakers whose voices are known: a folder with one short recording for each name. For one thread."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from cesar_mqtt.audio.decoder import AudioLimits
from cesar_mqtt.audio.decoder_process import open_audio
from cesar_mqtt.audio.paths import file_identity
from cesar_mqtt.errors import JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.whisper.diarization import DiarizationError, Diarizer
from cesar_mqtt.whisper.speaker_clustering import Embedding

log = get_logger(__name__)

_MOST_S = 120.0
"""A longer recording is not read: ten seconds are enough."""
_MOST_BYTES = 100_000_000


class KnownVoices:
    """The voices of a folder, computed when they are needed first or a file has changed; nothing is written to disk."""

    def __init__(self, directory: Path, threshold: float) -> None:
        """Take the folder as it will be when names are asked for.

        Args:
            directory: a recording is named as its speaker, with any ending; hidden files are left out.
            threshold: the least cosine of a voice and a known one for it to get the name.
        """
        self._directory = directory
        self._threshold = threshold
        self._voices: dict[Path, tuple[tuple[int, ...], Embedding | None]] = {}

    def names_of(
        self, voices: Mapping[int, Embedding], diarizer: Diarizer, *, should_stop: Callable[[], bool]
    ) -> dict[int, str]:
        """Return the names of the speakers that are known; each name at most once.

        A folder or recording that cannot be read is logged and left out.

        Raises:
            Cancelled: `should_stop` returned True.
        """
        return match(voices, self._read(diarizer, should_stop), self._threshold)

    def _read(self, diarizer: Diarizer, should_stop: Callable[[], bool]) -> dict[str, Embedding]:
        try:
            paths = sorted(path for path in self._directory.resolve().iterdir() if not path.name.startswith("."))
        except OSError as exc:
            log.warning("The folder of known voices cannot be read: %s", exc.strerror, action="known_voices_failed")
            return {}
        known: dict[str, Embedding] = {}
        kept: dict[Path, tuple[tuple[int, ...], Embedding | None]] = {}
        for path in paths:
            try:
                identity = file_identity(path.lstat())
            except OSError:
                continue
            before = self._voices.get(path)
            voice = before[1] if before and before[0] == identity else _voice_in(path, diarizer, should_stop)
            kept[path] = identity, voice
            if voice is not None:
                known.setdefault(path.stem, voice)
        self._voices = kept
        return known


def match(voices: Mapping[int, Embedding], known: Mapping[str, Embedding], threshold: float) -> dict[int, str]:
    """Give names to voices, the surest first; each name and each voice at most once."""
    pairs = [
        (float(np.dot(voice, known_voice)), speaker, name)
        for speaker, voice in voices.items()
        for name, known_voice in known.items()
    ]
    names: dict[int, str] = {}
    for likeness, speaker, name in sorted(pairs, key=lambda pair: -pair[0]):
        if likeness >= threshold and speaker not in names and name not in names.values():
            names[speaker] = name
    return names


def _voice_in(path: Path, diarizer: Diarizer, should_stop: Callable[[], bool]) -> Embedding | None:
    """Return the voice of a recording, that of all its speech; None: it cannot be read, or holds no speech."""
    limits = AudioLimits(max_bytes=_MOST_BYTES, max_duration_s=_MOST_S)
    try:
        with open_audio(path, limits, should_stop=should_stop) as audio:
            found = diarizer.diarize(
                audio.blocks(should_stop), max_speakers=1, on_progress=lambda _seconds: None, should_stop=should_stop
            )
    except (DiarizationError, JobFailedError) as exc:
        log.warning("The known voice %s cannot be read: %s", path.name, exc, action="known_voice_unreadable")
        return None
    if not found.voices:
        log.warning("The known voice %s holds no speech", path.name, action="known_voice_unreadable")
    return found.voices.get(1)
