"""Where audio has speech, and where it can be cut without cutting a word: by faster-whisper's Silero VAD.

Any thread may call it.
"""

from typing import TypeAlias

import numpy as np
from faster_whisper.vad import get_vad_model
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples

Probabilities: TypeAlias = NDArray[np.float32]
"""Of speech, one for each 512 samples, the last of which may be fewer."""

Range: TypeAlias = tuple[int, int]
"""Its first sample, and the one after its last."""

FRAME_SAMPLES = 512
"""Samples for which the VAD gives one probability."""
_CONTEXT = 64
"""Samples before a frame that the VAD is given with it."""
_BLOCK_FRAMES = 64
"""2 s."""
SPEECH_FROM, SILENT_BELOW = 0.5, 0.35
"""Silero's limits for the start and the end of speech; faster-whisper's `vad_filter` has the same."""
_MIN_SILENCE = 2 * SAMPLE_RATE
_PADDING = 2 * SAMPLE_RATE // 5
"""Of `vad_filter`: shorter silence stays in the speech, and so much on each side of it counts as speech (0.4 s)."""
_MIN_PAUSE_FRAMES = 7
"""Shorter pauses (0.22 s) occur inside words, before a hard consonant."""
_SMOOTHED_FRAMES = 5
_SAMPLES_PER_MS = SAMPLE_RATE // 1000


def speech_probabilities(samples: Samples) -> Probabilities:
    """Run the VAD, which begins without any memory; about 2 ms for each second.

    Gives what faster-whisper's `SileroVADModel` gives, but in blocks: a minute at once takes 40 MB, and 8 s take 7 MB.
    """
    if len(samples) > _BLOCK_FRAMES * FRAME_SAMPLES and not samples.any():  # a file of some KB may hold hours of it
        return np.zeros(-(-len(samples) // FRAME_SAMPLES), np.float32)
    session = get_vad_model().session
    state = {name: np.zeros((1, 1, 128), np.float32) for name in ("h", "c")}
    found = [np.empty(0, np.float32)]
    context = np.zeros(_CONTEXT, np.float32)
    for first in range(0, len(samples), _BLOCK_FRAMES * FRAME_SAMPLES):
        block = samples[first : first + _BLOCK_FRAMES * FRAME_SAMPLES]
        padded = np.concatenate((context, block, np.zeros(-len(block) % FRAME_SAMPLES, np.float32)))
        context = block[-_CONTEXT:]
        inputs = np.lib.stride_tricks.sliding_window_view(padded, _CONTEXT + FRAME_SAMPLES)[::FRAME_SAMPLES]
        probabilities, state["h"], state["c"] = session.run(None, {"input": np.ascontiguousarray(inputs), **state})
        found.append(probabilities.reshape(-1))
    return np.concatenate(found)


def speech_ranges(probabilities: Probabilities, length: int) -> tuple[Range, ...]:
    """The ranges that hold speech, by the rules of faster-whisper's `get_speech_timestamps`.

    Args:
        probabilities: of the samples, or of more.
        length: how many samples there are.
    """
    found: list[Range] = []
    start = silent_from = None
    for frame, probability in enumerate(probabilities[: -(-length // FRAME_SAMPLES)].tolist()):
        if probability >= SPEECH_FROM:
            start, silent_from = frame if start is None else start, None
        elif probability < SILENT_BELOW and start is not None:
            silent_from = frame if silent_from is None else silent_from
            if (frame - silent_from) * FRAME_SAMPLES >= _MIN_SILENCE:
                found.append((start * FRAME_SAMPLES, silent_from * FRAME_SAMPLES))
                start = silent_from = None
    if start is not None:
        found.append((start * FRAME_SAMPLES, length))
    return tuple((max(0, start - _PADDING), min(length, end + _PADDING)) for start, end in found)


def find_cut(samples: Samples, probabilities: Probabilities, *, search_window: int) -> int:
    """Find the best place to cut: as late as possible, always in the second half.

    It is the middle of the longest pause in the last `search_window` samples. If those have none, the ones before are
    searched, and so on; if the whole second half has none, it is the quietest spot in the last `search_window`.

    Args:
        samples: as many as may stay before the cut.
        probabilities: of the samples, or of more.
        search_window: how many samples are searched at once.

    Returns:
        The number of samples before the cut, from half of them to all of them; whole milliseconds, if there are enough
        samples for that.
    """
    half = len(samples) // 2
    search_window = min(search_window, len(samples) - half)
    for end in range(len(samples), half, -search_window):
        pause = _longest_pause(probabilities, max(half, end - search_window), end)
        if pause is not None:
            return max(half, _round_down_to_ms(pause))
    start = len(samples) - search_window
    return max(half, _round_down_to_ms(start + _quietest(samples[start:])))


def split(samples: Samples, limit: int, *, search_window: int | None = None) -> list[Range]:
    """Cut at pauses into pieces of at most `limit` samples; each as its first sample and the one after its last.

    Args:
        samples: as many as there are.
        limit: of a piece.
        search_window: as of `find_cut`; None: a fifth of the limit, since a piece that is cut far before it costs time.
    """
    pieces = []
    start = 0
    while len(samples) - start > limit:
        piece = samples[start : start + limit]
        cut = find_cut(piece, speech_probabilities(piece), search_window=search_window or limit // 5)
        end = start + max(1, cut)
        pieces.append((start, end))
        start = end
    return [*pieces, (start, len(samples))]


def _longest_pause(probabilities: Probabilities, start: int, end: int) -> int | None:
    """The middle of the longest pause between two samples, the last of several; None if there is no pause."""
    first = start // FRAME_SAMPLES
    silent = np.concatenate(([False], probabilities[first : -(-end // FRAME_SAMPLES)] < SILENT_BELOW, [False]))
    begins, ends = np.flatnonzero(~silent[:-1] & silent[1:]), np.flatnonzero(silent[:-1] & ~silent[1:])
    lengths = ends - begins
    if not lengths.size or lengths.max() < _MIN_PAUSE_FRAMES:
        return None
    longest = len(lengths) - 1 - int(np.argmax(lengths[::-1]))
    return min(end, (2 * first + int(begins[longest] + ends[longest])) * FRAME_SAMPLES // 2)


def _quietest(samples: Samples) -> int:
    frames = len(samples) // FRAME_SAMPLES
    if frames < _SMOOTHED_FRAMES:
        return len(samples)
    power = np.square(samples[: frames * FRAME_SAMPLES]).reshape(frames, FRAME_SAMPLES).mean(axis=1)
    smoothed = np.convolve(power, np.ones(_SMOOTHED_FRAMES), mode="valid")
    return int(np.argmin(smoothed)) * FRAME_SAMPLES + _SMOOTHED_FRAMES * FRAME_SAMPLES // 2


def _round_down_to_ms(position: int) -> int:
    return position - position % _SAMPLES_PER_MS
