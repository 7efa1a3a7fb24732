"""From a recording to a transcript, window by window: any length needs the same memory, and can be resumed.

Knows nothing of jobs or MQTT. Progress, segments, windows and cancellation go through callbacks, which run in the
thread that transcribes, the worker's.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cesar_mqtt.audio.decoder_process import limits_of
from cesar_mqtt.audio.windows import Chunk, Recording
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError, Preempted
from cesar_mqtt.logs import get_logger
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window, Word
from cesar_mqtt.whisper.decoding import Language
from cesar_mqtt.whisper.features import LARGE_SAMPLES
from cesar_mqtt.whisper.hardware import release_memory
from cesar_mqtt.whisper.model_store import ModelStore, is_out_of_memory
from cesar_mqtt.whisper.pipeline import Pipeline

log = get_logger(__name__)

_MIN_LOGPROB = -100.0
"""In place of an average log probability that is not finite."""


class Transcriber:
    """Turns recordings into transcripts, one at a time. Only `open` may be called from any thread."""

    def __init__(
        self, models: ModelStore, audio: AudioSettings, *, window_s: float = 600.0, short_encoder_input: bool = True
    ) -> None:
        self._models = models
        self._limits = limits_of(audio)
        self._window_s = window_s
        self._short_encoder_input = short_encoder_input

    def warm_up(self, model_size: str) -> None:
        """Load a model ahead of the first job that needs it.

        Raises:
            JobFailedError: `model_unavailable`.
        """
        self._models.load(model_size)

    def open(self, path: Path, options: TranscriptionOptions, *, from_s: float = 0.0) -> Recording:
        """Start decoding a file; returns at once. Any thread may call it; the caller closes the recording.

        Args:
            path: absolute and without symbolic links, as `open_audio` requires it.
            options: of the job, with its clip ranges.
            from_s: `until_s` of the last window that an earlier attempt finished.
        """
        return Recording(
            path,
            limits=self._limits,
            window_s=self._window_s,
            clips=options.clips,
            from_s=from_s,
            vad_filter=options.vad_filter,
            track=options.audio_track,
        )

    def transcribe(
        self,
        recording: Recording,
        options: TranscriptionOptions,
        *,
        done: Sequence[Window] = (),
        on_progress: Callable[[Progress], None],
        on_segment: Callable[[Segment], None],
        on_window: Callable[[Window], None],
        should_stop: Callable[[], bool],
        should_yield: Callable[[], bool] = lambda: False,
    ) -> Transcript:
        """Transcribe a recording that `open` returned for the same options; does not close it.

        Args:
            recording: opened where `done` ends.
            options: of the job.
            done: the windows that an earlier attempt finished.
            on_progress: called at the start and whenever there is progress.
            on_segment: called with each new segment.
            on_window: called with each new window but the last, whose end is the end of the recording.
            should_stop: asked during decoding, before each step of the model and after each segment.
            should_yield: asked after each `on_window`.

        Raises:
            JobFailedError: `audio_*` for the file, `model_unavailable` for the model, `invalid_request` for what the
                model cannot do or the file does not have, `internal` if the model fails in the middle.
            Cancelled: `should_stop` returned True.
            Preempted: `should_yield` returned True.
        """
        draft = _Draft(recording, options, done, on_progress=on_progress, on_segment=on_segment)
        draft.report_progress(done[-1].until_s if done else 0.0)
        pipeline: Pipeline | None = None
        for chunk in recording.chunks(should_stop):
            draft.report_progress(chunk.start_s)
            if chunk.speech:
                pipeline = pipeline or self._make_pipeline(options, should_stop)
                with closing(self._segments(pipeline, chunk, options.model_size, draft)) as segments:
                    for segment, raw_text in segments:
                        draft.add(segment, raw_text)
                        _check_cancelled(should_stop)
                self._models.mark_used()
            window = draft.close_window(chunk.end_s)
            if not chunk.last:
                on_window(window)
                if should_yield():
                    raise Preempted
        return draft.transcript(recording.warnings + (pipeline.warnings if pipeline is not None else ()))

    def _make_pipeline(self, options: TranscriptionOptions, should_stop: Callable[[], bool]) -> Pipeline:
        model = self._models.load(options.model_size, should_stop=should_stop)
        pipeline = Pipeline(
            model,
            options,
            device=self._models.device,
            should_stop=should_stop,
            short_encoder_input=self._short_encoder_input,
        )
        _check_cancelled(should_stop)
        return pipeline

    def _segments(
        self, pipeline: Pipeline, chunk: Chunk, model_size: str, draft: "_Draft"
    ) -> Generator[tuple[Segment, str], None, None]:
        """Yield each segment with the model's own text, whose leading blank joins it to the one before."""
        with self._model_errors(model_size):
            raw_segments, language = pipeline.transcribe(chunk.samples, chunk.speech, draft.language)
        draft.set_detected_language(language)
        if len(chunk.samples) > LARGE_SAMPLES:  # VAD and features leave up to 300 MB fragmented, more with each chunk
            release_memory()
        length_s = chunk.end_s - chunk.start_s
        with closing(raw_segments), self._model_errors(model_size):
            for raw in raw_segments:
                if raw.start < length_s:  # Whisper pads with silence to 30 s, and may make up text for it
                    yield _segment(raw, chunk, after=draft.last_segment), raw.text

    @contextmanager
    def _model_errors(self, model_size: str) -> Iterator[None]:
        """Translate an error inside the model, which is no fault of the audio, and unload the model."""
        try:
            yield
        except (MemoryError, RuntimeError, ValueError) as exc:
            self._models.unload()
            reason = "ran out of memory" if is_out_of_memory(exc) else "failed"
            log.warning("Model %s %s: %s", model_size, reason, exc, action="model_failed")
            raise JobFailedError(
                ErrorCode.INTERNAL,
                f"The model {model_size!r} {reason} while it transcribed; the audio itself could be read: retry, or "
                "choose a smaller model.",
            ) from exc


class _Draft:
    """A transcript in the making: the finished windows, the segments of the current one, language and progress.

    Attributes:
        language: of the job, or detected in the first window with speech; None: not detected yet.
        last_segment: of all windows; None: no speech yet.
    """

    def __init__(
        self,
        recording: Recording,
        options: TranscriptionOptions,
        done: Sequence[Window],
        *,
        on_progress: Callable[[Progress], None],
        on_segment: Callable[[Segment], None],
    ) -> None:
        self._recording = recording
        self._windows = list(done)
        self._on_progress = on_progress
        self._on_segment = on_segment
        self._segments: list[Segment] = []
        self._text = ""
        self._processed_s = 0.0
        self._reported: Progress | None = None
        self.last_segment = next((window.segments[-1] for window in reversed(done) if window.segments), None)
        spoken = next((window for window in done if window.language is not None), None)
        self.language = options.language
        self._probability: float | None = None if options.language is None else 1.0
        self._detected: tuple[str, float] | None = None
        if spoken is not None:
            self.language, self._probability = spoken.language, spoken.language_probability

    def report_progress(self, processed_s: float) -> None:
        """Report how much is processed, if that has changed; never less than before, nor more than the duration."""
        duration_s = self._recording.duration_s
        limit_s = math.inf if duration_s is None else duration_s
        self._processed_s = max(self._processed_s, min(processed_s, limit_s))
        shown_s = None if duration_s is None else round(max(duration_s, self._processed_s), 3)
        progress = Progress(round(self._processed_s, 3), shown_s)
        if progress != self._reported:
            self._reported = progress
            self._on_progress(progress)

    def set_detected_language(self, language: Language | None) -> None:
        """Keep the language that was detected in a chunk; it counts once the chunk has a segment."""
        if language is not None:
            self._detected = language.code, _finite(language.probability, otherwise=0.0)

    def add(self, segment: Segment, raw_text: str) -> None:
        if self._probability is None and self._detected is not None:
            self.language, self._probability = self._detected
        self._segments.append(segment)
        self._text += raw_text
        self.last_segment = segment
        self._on_segment(segment)
        self.report_progress(segment.end_s)

    def close_window(self, until_s: float) -> Window:
        spoken = bool(self._segments)
        window = Window(
            number=len(self._windows),
            until_s=until_s,
            text=self._text,
            language=self.language if spoken else None,  # faster-whisper returns one for silence, too
            language_probability=self._probability if spoken else None,
            segments=tuple(self._segments),
        )
        self._windows.append(window)
        self._segments, self._text = [], ""
        self.report_progress(until_s)
        return window

    def transcript(self, warnings: tuple[str, ...]) -> Transcript:
        spoken = self.last_segment is not None
        duration_s = self._recording.duration_s
        return Transcript(
            text="".join(window.text for window in self._windows).strip(),
            language=self.language if spoken else None,
            language_probability=self._probability if spoken else None,
            no_speech=not spoken,
            audio_duration_s=round(self._processed_s if duration_s is None else duration_s, 3),
            windows=tuple(self._windows),
            warnings=warnings,
        )


def _segment(raw: Any, chunk: Chunk, *, after: Segment | None) -> Segment:
    start_s = _in_file(raw.start, chunk, otherwise=chunk.start_s)
    if after is not None:  # batched, a time may lie outside of the piece that it belongs to
        start_s = max(start_s, after.start_s)
    return Segment(
        id=1 if after is None else after.id + 1,
        start_s=start_s,
        end_s=max(start_s, _in_file(raw.end, chunk, otherwise=start_s)),
        text=raw.text.strip(),
        avg_logprob=_finite(raw.avg_logprob, otherwise=_MIN_LOGPROB),
        no_speech_prob=_finite(raw.no_speech_prob, otherwise=0.0),
        words=None if raw.words is None else tuple(_word(word, chunk) for word in raw.words),
    )


def _word(raw: Any, chunk: Chunk) -> Word:
    start_s = _in_file(raw.start, chunk, otherwise=chunk.start_s)
    end_s = max(start_s, _in_file(raw.end, chunk, otherwise=start_s))
    return Word(start_s=start_s, end_s=end_s, text=raw.word, probability=_finite(raw.probability, otherwise=0.0))


def _in_file(time_s: float, chunk: Chunk, *, otherwise: float) -> float:
    """Convert a time in the chunk to one in the file, rounded to three decimals and limited to the chunk."""
    in_file_s = _finite(chunk.start_s + float(time_s), otherwise=otherwise)
    return min(max(round(chunk.start_s, 3), in_file_s), round(chunk.end_s, 3))


def _finite(value: float, *, otherwise: float) -> float:
    """Make a plain float of three decimals; some devices compute NaN, which JSON cannot represent."""
    plain = float(value)
    return round(plain, 3) + 0.0 if math.isfinite(plain) else otherwise


def _check_cancelled(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Cancelled
