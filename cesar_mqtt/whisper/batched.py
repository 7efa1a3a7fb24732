"""Decoding of many pieces of a chunk at once, without the losses of faster-whisper's batched pipeline.

That pipeline cuts at every pause of 0.16 s, requires the VAD, and transcribes each piece only as far as the model gets
in one pass: ten minutes of plain sentences lost one word in forty. Any thread that may use the model
may call it.
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
"""What Whisper encodes at once."""
_MIN_REMAINDER_S = 0.2
"""A shorter remainder of a piece can hold no word."""
_NO_SPEECH_ABOVE, _UNSURE_BELOW, _REPEATED_ABOVE = 0.6, -1.0, 2.4
"""Whisper's own limits on `no_speech_prob`, `avg_logprob` and `compression_ratio`."""

RawSegments: TypeAlias = Generator[Any, None, None]
"""faster-whisper's segments, each decoded when it is taken."""

_Piece: TypeAlias = tuple[int, int]
"""Its first sample, and the one after its last."""


def transcribe_batched(
    model: WhisperModel,
    samples: Samples,
    language: str | None,
    *,
    vad_filter: bool,
    batch_size: int,
    options: Mapping[str, Any],
) -> tuple[RawSegments, Any]:
    """Start a chunk: its speech is concatenated, cut into pieces at the longest pauses, and decoded in batches.

    Args:
        model: a model, or a view of one.
        samples: at least one.
        language: of the speech; None: detect it in the first batch.
        vad_filter: whether to leave out what is not speech.
        batch_size: how many pieces are decoded at once.
        options: further options, the same for both pipelines of faster-whisper.

    Returns:
        faster-whisper's segments, with times from the start of the samples, and its `TranscriptionInfo`, or None if
        there is no speech.
    """
    speech = get_speech_timestamps(samples) if vad_filter else [{"start": 0, "end": len(samples)}]
    if not speech:
        return _no_segments(), None
    spoken = np.concatenate([samples[part["start"] : part["end"]] for part in speech])
    pieces = split(spoken, _PIECE_S * SAMPLE_RATE)
    batches = [pieces[first : first + batch_size] for first in range(0, len(pieces), batch_size)]
    transcription = _BatchedTranscription(model, spoken, options)
    first, info = transcription.start(batches[0], language)
    segments = transcription.segments(first, batches[1:], info.language)
    return _without_silence(restore_speech_timestamps(segments, speech, SAMPLE_RATE)), info


class _BatchedTranscription:
    """Transcribes batch by batch, and the remainders that one pass has left with the plain pipeline."""

    def __init__(self, model: WhisperModel, samples: Samples, options: Mapping[str, Any]) -> None:
        self._model = model
        self._samples = samples
        self._options = options
        self._remainders: list[tuple[float, float]] = []
        self._tracked: Any = copy.copy(model)
        self._tracked._split_segments_by_timestamps = self._split_and_track  # noqa: SLF001 - there is no public hook

    def start(self, batch: Sequence[_Piece], language: str | None) -> tuple[RawSegments, Any]:
        # A new pipeline each time: it keeps state of the audio before, even of one that was cancelled.
        segments, info = BatchedInferencePipeline(self._tracked).transcribe(
            self._samples,
            language=language,
            batch_size=len(batch),
            clip_timestamps=[{"start": start / SAMPLE_RATE, "end": end / SAMPLE_RATE} for start, end in batch],
            without_timestamps=False,  # segments of a sentence, not of half a minute
            **self._options,
        )
        return segments, info

    def segments(self, first: RawSegments, further: Sequence[Sequence[_Piece]], language: str) -> RawSegments:
        """Yield the segments of the batch that was started, and of those that follow."""
        yield from self._with_remainders(first, language)
        for batch in further:
            yield from self._with_remainders(self.start(batch, language)[0], language)

    def _with_remainders(self, started: RawSegments, language: str) -> list[Any]:
        segments = list(started)
        remainders, self._remainders = self._remainders, []
        for start_s, end_s in remainders:
            segments += self._remainder(start_s, end_s, language)
        return sorted(segments, key=lambda segment: float(segment.start))

    def _remainder(self, start_s: float, end_s: float, language: str) -> RawSegments:
        segments, _ = self._model.transcribe(
            self._samples[int(start_s * SAMPLE_RATE) : int(end_s * SAMPLE_RATE)],
            language=language,
            vad_filter=False,
            condition_on_previous_text=False,
            **self._options,
        )
        for segment in segments:
            for timed in (segment, *(segment.words or ())):
                timed.start += start_s
                timed.end += start_s
            yield segment

    def _split_and_track(self, **arguments: Any) -> Any:
        """Track how far the model got in a piece: the plain pipeline would seek there and go on."""
        result = self._model._split_segments_by_timestamps(**arguments)  # noqa: SLF001
        _, frames, _ = result
        start_s = arguments["time_offset"] + frames / self._model.frames_per_second
        end_s = arguments["time_offset"] + arguments["segment_duration"]
        if end_s - start_s > _MIN_REMAINDER_S:
            self._remainders.append((start_s, end_s))
        return result


def _no_segments() -> RawSegments:
    yield from ()


def _without_silence(segments: RawSegments) -> RawSegments:
    """Drop what the plain pipeline would drop or decode again: empty segments, and those made up for silence."""
    for segment in segments:
        is_doubtful = segment.avg_logprob < _UNSURE_BELOW or segment.compression_ratio > _REPEATED_ABOVE
        if segment.text.strip() and not (is_doubtful and segment.no_speech_prob > _NO_SPEECH_ABOVE):
            yield segment
