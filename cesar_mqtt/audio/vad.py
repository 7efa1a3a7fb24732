"""Where audio may be cut so that no word is cut with it: in the pauses that the Silero VAD of faster-whisper hears.

Any thread may call it.
"""

import numpy as np
from faster_whisper.vad import get_vad_model
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples

_CHUNK = 512
"""Samples that the VAD judges at once."""
_LEAST_CHUNKS = 7
"""Shorter pauses (0.22 s) are found inside of words, before a hard consonant."""
_SILENT_BELOW = 0.35
"""Silero's own limit for the end of speech, at its default threshold of 0.5."""
_LEAD = 32 * _CHUNK
"""About a second that the VAD listens to before its judgement counts: it begins without any memory."""
_PART = 60 * SAMPLE_RATE
_PIECE_PART = 6 * SAMPLE_RATE
"""Of a piece less is looked through at once: each sample that it is shorter than it may be costs time."""
_SMOOTHED_CHUNKS = 5
_WHOLE_MS = SAMPLE_RATE // 1000


def find_cut(samples: Samples, *, part: int = _PART) -> int:
    """Find the best place to cut a stretch in two: as far behind as possible, always in its second half.

    It is the middle of the longest pause in the last part. Where that holds none, the part before it is looked
    through, and so on; where the whole second half holds none, it is the quietest spot in the last part.

    Args:
        samples: the stretch, which itself is the most that may stay before the cut.
        part: how many samples to look through at once; a minute if nothing is said.

    Returns:
        How many samples stay before the cut, from half of them to all of them; whole milliseconds, as far as the
        stretch is long enough for that.
    """
    half = len(samples) // 2
    part = min(part, len(samples) - half)
    for end in range(len(samples), half, -part):
        start = max(half, end - part)
        pause = _longest_pause(samples, start, end)
        if pause is not None:
            return max(half, _rounded(pause))
    start = len(samples) - part
    return max(half, _rounded(start + _quietest(samples[start:])))


def split(samples: Samples, most: int) -> list[tuple[int, int]]:
    """Cut a stretch into pieces of at most `most` samples; each with its first sample and the one after its last."""
    pieces = []
    start = 0
    while len(samples) - start > most:
        end = start + max(1, find_cut(samples[start : start + most], part=_PIECE_PART))
        pieces.append((start, end))
        start = end
    return [*pieces, (start, len(samples))]


def _longest_pause(samples: Samples, start: int, end: int) -> int | None:
    """Give the middle of the longest pause between two samples, the last of several; None if there is no pause."""
    lead = min(start, _LEAD)
    speech = _speech_probabilities(samples[start - lead : end])[lead // _CHUNK :]
    silent = np.concatenate(([False], speech < _SILENT_BELOW, [False]))
    begins, ends = np.flatnonzero(~silent[:-1] & silent[1:]), np.flatnonzero(silent[:-1] & ~silent[1:])
    lengths = ends - begins
    if not lengths.size or lengths.max() < _LEAST_CHUNKS:
        return None
    longest = len(lengths) - 1 - int(np.argmax(lengths[::-1]))
    return min(end, start + int(begins[longest] + ends[longest]) * _CHUNK // 2)


def _speech_probabilities(samples: Samples) -> NDArray[np.float32]:
    # Padded into a copy of its own: the VAD writes zeros into what it is given.
    padded = np.pad(samples, (0, -len(samples) % _CHUNK or _CHUNK))
    probabilities: NDArray[np.float32] = get_vad_model()(padded)
    return probabilities.reshape(-1)[: -(-len(samples) // _CHUNK)]


def _quietest(samples: Samples) -> int:
    chunks = len(samples) // _CHUNK
    if chunks < _SMOOTHED_CHUNKS:
        return len(samples)
    power = np.square(samples[: chunks * _CHUNK]).reshape(chunks, _CHUNK).mean(axis=1)
    smoothed = np.convolve(power, np.ones(_SMOOTHED_CHUNKS), mode="valid")
    return int(np.argmin(smoothed)) * _CHUNK + _SMOOTHED_CHUNKS * _CHUNK // 2


def _rounded(place: int) -> int:
    return place - place % _WHOLE_MS
