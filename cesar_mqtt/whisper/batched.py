"""Hearing many pieces of a stretch at once, without what faster-whisper's batched pipeline loses on the way.

It cuts wherever somebody draws breath for 0.16 s, cannot do without the VAD, and hears each piece only as far as the
model gets in one go: ten minutes of plain sentences lost one word in forty. Only the worker thread may call it.
"""

import copy
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.transcribe import restore_speech_timestamps
from faster_whisper.vad import get_speech_timestamps

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.audio.vad import split

_PIECE_S = 30
"""What Whisper hears at once."""
_LEAST_REST_S = 0.2
"""No word is shorter than what may be left at the end of a piece without being heard."""
_NO_SPEECH_ABOVE, _UNSURE_BELOW, _REPEATED_ABOVE = 0.6, -1.0, 2.4
"""Whisper's own limits on `no_speech_prob`, `avg_logprob` and `compression_ratio`."""

Lazy: TypeAlias = Generator[Any, None, None]
"""faster-whisper's segments, each made when it is asked for."""

_Piece: TypeAlias = tuple[int, int]
"""Its first sample, and the one after its last."""


def listen_batched(
    model: WhisperModel,
    samples: Samples,
    language: str | None,
    *,
    vad_filter: bool,
    at_once: int,
    asked: Mapping[str, Any],
) -> tuple[Lazy, Any]:
    """Begin with a stretch: what is speech is put together, cut in its longest pauses, and heard in batches.

    Args:
        model: one to ask, or a view of one.
        samples: at least one.
        language: the one to listen for; None: detect it, in the first batch.
        vad_filter: whether to leave out what is not speech.
        at_once: how many pieces make a batch.
        asked: further options, the same for both pipelines of faster-whisper.

    Returns:
        faster-whisper's segments, with times from the start of the samples, and its `TranscriptionInfo`, or None where
        nothing is to be heard.
    """
    speech = get_speech_timestamps(samples) if vad_filter else [{"start": 0, "end": len(samples)}]
    if not speech:
        return _nothing(), None
    heard = np.concatenate([samples[part["start"] : part["end"]] for part in speech])
    pieces = split(heard, _PIECE_S * SAMPLE_RATE)
    batches = [pieces[first : first + at_once] for first in range(0, len(pieces), at_once)]
    hearing = _Hearing(model, heard, asked)
    first, info = hearing.begin(batches[0], language)
    segments = hearing.segments(first, batches[1:], info.language)
    return _spoken(restore_speech_timestamps(segments, speech, SAMPLE_RATE)), info


class _Hearing:
    """Hears batch by batch, and what was not heard in a piece in one go by the plain pipeline."""

    def __init__(self, model: WhisperModel, samples: Samples, asked: Mapping[str, Any]) -> None:
        self._model = model
        self._samples = samples
        self._asked = asked
        self._rests: list[tuple[float, float]] = []
        self._noting: Any = copy.copy(model)
        self._noting._split_segments_by_timestamps = self._split_and_note  # noqa: SLF001 - nowhere else is it known

    def begin(self, batch: Sequence[_Piece], language: str | None) -> tuple[Lazy, Any]:
        # A new pipeline each time: it keeps what it knew of the audio before, also when that was broken off.
        lazy, info = BatchedInferencePipeline(self._noting).transcribe(
            self._samples,
            language=language,
            batch_size=len(batch),
            clip_timestamps=[{"start": start / SAMPLE_RATE, "end": end / SAMPLE_RATE} for start, end in batch],
            without_timestamps=False,  # segments of a sentence, not of half a minute
            **self._asked,
        )
        return lazy, info

    def segments(self, first: Lazy, further: Sequence[Sequence[_Piece]], language: str) -> Lazy:
        """Give the segments of the batch that was begun, and of those that follow."""
        yield from self._whole(first, language)
        for batch in further:
            yield from self._whole(self.begin(batch, language)[0], language)

    def _whole(self, begun: Lazy, language: str) -> list[Any]:
        found = list(begun)
        rests, self._rests = self._rests, []
        for start_s, end_s in rests:
            found += self._rest(start_s, end_s, language)
        return sorted(found, key=lambda segment: float(segment.start))

    def _rest(self, start_s: float, end_s: float, language: str) -> Lazy:
        segments, _ = self._model.transcribe(
            self._samples[int(start_s * SAMPLE_RATE) : int(end_s * SAMPLE_RATE)],
            language=language,
            vad_filter=False,
            condition_on_previous_text=False,
            **self._asked,
        )
        for segment in segments:
            for timed in (segment, *(segment.words or ())):
                timed.start += start_s
                timed.end += start_s
            yield segment

    def _split_and_note(self, **given: Any) -> Any:
        """Note how far the model got: where it names a time and goes on, the plain pipeline would start from there."""
        split_up = self._model._split_segments_by_timestamps(**given)  # noqa: SLF001
        _, frames, _ = split_up
        start_s = given["time_offset"] + frames / self._model.frames_per_second
        end_s = given["time_offset"] + given["segment_duration"]
        if end_s - start_s > _LEAST_REST_S:
            self._rests.append((start_s, end_s))
        return split_up


def _nothing() -> Lazy:
    yield from ()


def _spoken(segments: Lazy) -> Lazy:
    """Leave out what the plain pipeline would leave out or hear again: nothing, and what it makes of silence."""
    for segment in segments:
        is_doubtful = segment.avg_logprob < _UNSURE_BELOW or segment.compression_ratio > _REPEATED_ABOVE
        if segment.text.strip() and not (is_doubtful and segment.no_speech_prob > _NO_SPEECH_ABOVE):
            yield segment
