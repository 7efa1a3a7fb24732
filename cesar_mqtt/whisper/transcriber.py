"""From a recording to a transcript, window by window: any length needs the same memory, and can be resumed.

Knows nothing of jobs or MQTT. Several windows are transcribed at once, by threads that live as long as the call. All
callbacks run in the thread that calls, the worker's, and in the order of the recording; only `should_stop` is asked by
the other threads, too, by one at a time.
"""

import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from cesar_mqtt.audio.decoder import SAMPLE_RATE
from cesar_mqtt.audio.decoder_process import limits_of
from cesar_mqtt.audio.windows import Chunk, Recording
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError, Preempted
from cesar_mqtt.logs import get_logger
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window, Word
from cesar_mqtt.whisper.chunk import RawSegment
from cesar_mqtt.whisper.decoding import Language
from cesar_mqtt.whisper.model_store import ModelStore, is_out_of_memory
from cesar_mqtt.whisper.ordered_work import OrderedWork
from cesar_mqtt.whisper.pipeline import PIECE_S, Pipeline, uses_batches

log = get_logger(__name__)

_MIN_LOGPROB = -100.0
"""In place of an average log probability that is not finite."""
_MAX_REPEATED_S = 240.0
"""The most audio that a crash may repeat, unless one window is longer."""


class Transcriber:
    """Turns recordings into transcripts, one at a time. Only `open` may be called from any thread."""

    def __init__(
        self, models: ModelStore, audio: AudioSettings, *, window_s: float = 60.0, short_encoder_input: bool = True
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
            window_s=self._window_of(options),
            clips=options.clips,
            from_s=from_s,
            vad_filter=options.vad_filter,
            track=options.audio_track,
        )

    def _window_of(self, options: TranscriptionOptions) -> float:
        """The seconds of a window: enough pieces for a batch, where these are used."""
        if not uses_batches(self._models.device):
            return self._window_s
        return max(self._window_s, min(options.batch_size * PIECE_S, _MAX_REPEATED_S))

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
            should_yield: asked after each `on_window`. If it returns True, no further window is started, and those that
                were are finished.

        Raises:
            JobFailedError: `audio_*` for the file, `model_unavailable` for the model, `invalid_request` for what the
                model cannot do or the file does not have, `internal` if the model fails in the middle.
            Cancelled: `should_stop` returned True.
            Preempted: `should_yield` returned True, and windows are left.
        """
        stop = _StopFlag(should_stop)
        draft = _Draft(recording, options, done, on_progress=on_progress, on_segment=on_segment)
        draft.report_progress(done[-1].until_s if done else 0.0)
        recording.wait_until_open(stop)
        pipeline = self._make_pipeline(options, stop)  # the recording is decoded meanwhile
        parallel = self._parallel(options)
        work = OrderedWork(
            recording.chunks(stop),
            lambda chunk: _raw_segments(pipeline, chunk, draft.language, stop),
            threads=parallel,
            # The language that the first window with speech has is used for all others.
            limit=lambda: 1 if draft.language is None and pipeline.detects_language else parallel,
        )
        is_last = has_speech = False
        try:
            for chunk, raw_segments in work:
                has_speech = has_speech or bool(chunk.speech)
                draft.report_progress(chunk.start_s)
                for raw, language in raw_segments:
                    draft.add(_segment(raw, chunk, after=draft.last_segment), raw.text, language)
                    _check_cancelled(stop)
                self._models.mark_used()
                window = draft.close_window(chunk.end_s)
                is_last = chunk.last
                if not is_last:
                    on_window(window)
                    if should_yield():
                        work.finish()
        except _ModelError as exc:
            _end(work, stop)  # before the model is unloaded
            raise self._model_failure(options.model_size, exc.error) from exc.error
        finally:
            _end(work, stop)
        if not is_last:
            raise Preempted
        return draft.transcript(recording.warnings + (pipeline.warnings if has_speech else ()))

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

    def _parallel(self, options: TranscriptionOptions) -> int:
        """How many windows may be transcribed at once; a crash repeats all of them."""
        return min(self._models.workers, max(1, int(_MAX_REPEATED_S / self._window_of(options))))

    def _model_failure(self, model_size: str, error: Exception) -> JobFailedError:
        """Unload the model, and translate its error, which is no fault of the audio."""
        self._models.unload()
        reason = "ran out of memory" if is_out_of_memory(error) else "failed"
        log.warning("Model %s %s: %s", model_size, reason, error, action="model_failed")
        return JobFailedError(
            ErrorCode.INTERNAL,
            f"The model {model_size!r} {reason} while it transcribed; the audio itself could be read: retry, or "
            "choose a smaller model.",
        )


class _StopFlag:
    """A `should_stop` for several threads: they ask one at a time, and once it was True it stays True."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self._lock = threading.Lock()
        self._is_set = False

    def __call__(self) -> bool:
        with self._lock:
            self._is_set = self._is_set or self._should_stop()
            return self._is_set

    def set(self) -> None:
        with self._lock:
            self._is_set = True


class _ModelError(Exception):
    """An error inside the model, on its way from the thread that it happened in."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _end(work: OrderedWork[Any, Any], stop: _StopFlag) -> None:
    """End the threads; one that is inside the model finishes that step."""
    stop.set()
    work.close()


def _raw_segments(
    pipeline: Pipeline, chunk: Chunk, language: str | None, should_stop: Callable[[], bool]
) -> Generator[tuple[RawSegment, Language | None], None, None]:
    """Yield the segments of a chunk, each with the language of the chunk; for any thread.

    Raises:
        Cancelled: `should_stop` returned True.
        _ModelError: an error inside the model.
    """
    if not chunk.speech:
        return
    length_s = chunk.end_s - chunk.start_s
    try:
        raw_segments, found = pipeline.transcribe(chunk.samples, chunk.speech, language)
        with closing(raw_segments):
            for raw in raw_segments:
                if raw.start < length_s:  # Whisper pads with silence to 30 s, and may make up text for it
                    yield raw, found
                _check_cancelled(should_stop)
    except (MemoryError, RuntimeError, ValueError) as exc:
        raise _ModelError(exc) from exc


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

    def add(self, segment: Segment, raw_text: str, language: Language | None) -> None:
        """Add a segment with the model's own text, whose leading blank joins it to the one before.

        `language`: of its chunk; it counts if none is known yet.
        """
        if self._probability is None and language is not None:
            self.language = language.code
            self._probability = _finite(language.probability, otherwise=0.0)
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
    start_s, end_s = _in_speech(raw, chunk)
    if after is not None:  # batched, a time may lie outside of the piece that it belongs to
        start_s = max(start_s, after.start_s)
    return Segment(
        id=1 if after is None else after.id + 1,
        start_s=start_s,
        end_s=max(start_s, end_s),
        text=raw.text.strip(),
        avg_logprob=_finite(raw.avg_logprob, otherwise=_MIN_LOGPROB),
        no_speech_prob=_finite(raw.no_speech_prob, otherwise=0.0),
        words=None if raw.words is None else tuple(_word(word, chunk) for word in raw.words),
    )


def _word(raw: Any, chunk: Chunk) -> Word:
    start_s, end_s = _in_speech(raw, chunk)
    return Word(start_s=start_s, end_s=end_s, text=raw.word, probability=_finite(raw.probability, otherwise=0.0))


def _in_speech(raw: Any, chunk: Chunk) -> tuple[float, float]:
    """Convert start and end, in seconds from the start of the chunk, to times in the file, of three decimals.

    They are limited to one range of speech, the one that has most of the time between them, or is the nearest.
    """
    start_s = _finite(raw.start, otherwise=0.0)
    end_s = max(start_s, _finite(raw.end, otherwise=start_s))
    ranges = [(first / SAMPLE_RATE, behind / SAMPLE_RATE) for first, behind in chunk.speech]
    first_s, last_s = max(ranges, key=lambda part: min(end_s, part[1]) - max(start_s, part[0]))
    in_file_s = [chunk.start_s + min(max(time_s, first_s), last_s) for time_s in (start_s, end_s)]
    return round(in_file_s[0], 3), round(in_file_s[1], 3)


def _finite(value: float, *, otherwise: float) -> float:
    """Make a plain float of three decimals; some devices compute NaN, which JSON cannot represent."""
    plain = float(value)
    return round(plain, 3) + 0.0 if math.isfinite(plain) else otherwise


def _check_cancelled(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Cancelled
