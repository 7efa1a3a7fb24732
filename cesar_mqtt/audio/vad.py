"""Where audio can be cut without cutting a word: in the pauses that faster-whisper's Silero VAD detects.

Any thread may call it.
"""

import numpy as np
from faster_whisper.vad import get_vad_model
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples

_FRAME = 512
"""Samples for which the VAD gives one probability."""
_MIN_PAUSE_FRAMES = 7
"""Shorter pauses (0.22 s) occur inside words, before a hard consonant."""
_SILENT_BELOW = 0.35
"""Silero's own limit for the end of speech, at its default threshold of 0.5."""
_LEAD = 32 * _FRAME
"""About a second that the VAD is given before its result counts: it begins without any memory."""
_SEARCH_WINDOW = 60 * SAMPLE_RATE
_PIECE_SEARCH_WINDOW = 6 * SAMPLE_RATE
"""Smaller for short pieces: a piece that is cut far before its limit costs time."""
_SMOOTHED_FRAMES = 5
_SAMPLES_PER_MS = SAMPLE_RATE // 1000


def find_cut(samples: Samples, *, search_window: int = _SEARCH_WINDOW) -> int:
    """Find the best place to cut: as late as possible, always in the second half.

    It is the middle of the longest pause in the last `search_window` samples. If those have none, the ones before are
    searched, and so on; if the whole second half has none, it is the quietest spot in the last `search_window`.

    Args:
        samples: as many as may stay before the cut.
        search_window: how many samples are searched at once.

    Returns:
        The number of samples before the cut, from half of them to all of them; whole milliseconds, if there are enough
        samples for that.
    """
    half = len(samples) // 2
    search_window = min(search_window, len(samples) - half)
    for end in range(len(samples), half, -search_window):
        start = max(half, end - search_window)
        pause = _longest_pause(samples, start, end)
        if pause is not None:
            return max(half, _round_down_to_ms(pause))
    start = len(samples) - search_window
    return max(half, _round_down_to_ms(start + _quietest(samples[start:])))


def split(samples: Samples, limit: int) -> list[tuple[int, int]]:
    """Cut at pauses into pieces of at most `limit` samples; each as its first sample and the one after its last."""
    pieces = []
    start = 0
    while len(samples) - start > limit:
        end = start + max(1, find_cut(samples[start : start + limit], search_window=_PIECE_SEARCH_WINDOW))
        pieces.append((start, end))
        start = end
    return [*pieces, (start, len(samples))]


def _longest_pause(samples: Samples, start: int, end: int) -> int | None:
    """The middle of the longest pause between two samples, the last of several; None if there is no pause."""
    lead = min(start, _LEAD)
    speech = _speech_probabilities(samples[start - lead : end])[lead // _FRAME :]
    silent = np.concatenate(([False], speech < _SILENT_BELOW, [False]))
    begins, ends = np.flatnonzero(~silent[:-1] & silent[1:]), np.flatnonzero(silent[:-1] & ~silent[1:])
    lengths = ends - begins
    if not lengths.size or lengths.max() < _MIN_PAUSE_FRAMES:
        return None
    longest = len(lengths) - 1 - int(np.argmax(lengths[::-1]))
    return min(end, start + int(begins[longest] + ends[longest]) * _FRAME // 2)


def _speech_probabilities(samples: Samples) -> NDArray[np.float32]:
    # Padded into a copy: the VAD writes zeros into its input.
    padded = np.pad(samples, (0, -len(samples) % _FRAME or _FRAME))
    probabilities: NDArray[np.float32] = get_vad_model()(padded)
    return probabilities.reshape(-1)[: -(-len(samples) // _FRAME)]


def _quietest(samples: Samples) -> int:
    frames = len(samples) // _FRAME
    if frames < _SMOOTHED_FRAMES:
        return len(samples)
    power = np.square(samples[: frames * _FRAME]).reshape(frames, _FRAME).mean(axis=1)
    smoothed = np.convolve(power, np.ones(_SMOOTHED_FRAMES), mode="valid")
    return int(np.argmin(smoothed)) * _FRAME + _SMOOTHED_FRAMES * _FRAME // 2


def _round_down_to_ms(position: int) -> int:
    return position - position % _SAMPLES_PER_MS
