"""From a recording to a transcript, window by window, so that any length needs the same memory and can be resumed.

Knows nothing of jobs or MQTT. Progress and results are told, and whether to stop is asked, through callbacks that run
on the thread that transcribes, the worker's.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cesar_mqtt.audio.decoder import AudioLimits
from cesar_mqtt.audio.windows import Chunk, Recording
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.logs import get_logger
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window, Word
from cesar_mqtt.whisper.hardware import release_memory
from cesar_mqtt.whisper.interruptible import LARGE
from cesar_mqtt.whisper.model_store import ModelStore, is_out_of_memory
from cesar_mqtt.whisper.pipeline import Pipeline

log = get_logger(__name__)

_LEAST_LOGPROB = -100.0


class Transcriber:
    """Turns recordings into transcripts, one at a time. Only `open` may be called from any thread."""

    def __init__(self, models: ModelStore, audio: AudioSettings, *, window_s: float = 600.0) -> None:
        self._models = models
        self._limits = AudioLimits(max_bytes=audio.max_bytes, max_duration_s=audio.max_duration)
        self._window_s = window_s

    def warm_up(self, model_size: str) -> None:
        """Load a model ahead of the first job that needs it.

        Raises:
            JobFailedError: `model_unavailable`.
        """
        self._models.load(model_size)

    def open(self, path: Path, options: TranscriptionOptions, *, from_s: float = 0.0) -> Recording:
        """Begin to decode a file; returns at once. Any thread may call it; the caller closes what it gets.

        Args:
            path: absolute and without symbolic links, as `audio.open_audio` wants it.
            options: with the ranges that are wanted.
            from_s: `until_s` of the last window that an earlier attempt finished.
        """
        return Recording(path, limits=self._limits, window_s=self._window_s, clips=options.clips, from_s=from_s)

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
    ) -> Transcript:
        """Transcribe what `open` gave for the same options; does not close it.

        Args:
            recording: opened from where `done` ends.
            options: what the producer chose.
            done: the windows that an earlier attempt finished.
            on_progress: called at the start, and then whenever there is progress.
            on_segment: called with each segment that is new.
            on_window: called with each window that is new but the last, whose end is the end of all.
            should_stop: asked while the file is decoded, before each step of the model and after each segment.

        Raises:
            JobFailedError: `audio_*` for the file, `model_unavailable` for the model, `invalid_request` for what this
                model cannot do or this file has not, `internal` for a model that fails on the way.
            Cancelled: `should_stop` returned True.
        """
        tally = _Tally(recording, options, done, on_progress=on_progress, on_segment=on_segment)
        tally.reached(done[-1].until_s if done else 0.0)
        listener: Pipeline | None = None
        for stretch in recording.chunks(should_stop):
            tally.reached(stretch.start_s)
            if stretch.samples.size:
                listener = listener or self._listener(options, should_stop)
                with closing(self._heard(listener, stretch, options.model_size, tally)) as heard:
                    for segment, raw_text in heard:
                        tally.add(segment, raw_text)
                        _stop_if(should_stop)
                self._models.mark_used()
            window = tally.close_window(stretch.end_s)
            if not stretch.last:
                on_window(window)
        return tally.transcript(recording.warnings + (listener.warnings if listener is not None else ()))

    def _listener(self, options: TranscriptionOptions, should_stop: Callable[[], bool]) -> Pipeline:
        model = self._models.load(options.model_size, should_stop=should_stop)
        listener = Pipeline(model, options, device=self._models.device, should_stop=should_stop)
        _stop_if(should_stop)
        return listener

    def _heard(
        self, listener: Pipeline, stretch: Chunk, model_size: str, tally: "_Tally"
    ) -> Generator[tuple[Segment, str], None, None]:
        """Give each segment with its text as the model has it, whose leading blank joins it to the one before."""
        with self._blaming(model_size):
            raw_segments, info = listener.listen(stretch.samples, tally.language)
        tally.listening(info)
        if len(stretch.samples) > LARGE:  # VAD and features leave up to 300 MB of holes behind, more with each window
            release_memory()
        length_s = stretch.end_s - stretch.start_s
        with closing(raw_segments), self._blaming(model_size):
            for raw in raw_segments:
                if raw.start < length_s:  # Whisper fills up to 30 s with silence, and may hear something in it
                    yield _segment(raw, stretch, after=tally.last), raw.text

    @contextmanager
    def _blaming(self, model_size: str) -> Iterator[None]:
        """Tell what goes wrong inside the model from what is wrong with the audio, and start afresh the next time."""
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


class _Tally:
    """What one transcription has so far: its windows, the one it is in, its language, and how far it is."""

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
        self._told: Progress | None = None
        self.last = next((window.segments[-1] for window in reversed(done) if window.segments), None)
        spoken = next((window for window in done if window.language is not None), None)
        self.language = options.language
        self._probability: float | None = None if options.language is None else 1.0
        self._detected: tuple[str, float] | None = None
        if spoken is not None:
            self.language, self._probability = spoken.language, spoken.language_probability

    def reached(self, processed_s: float) -> None:
        """Tell how far it is; never less than before, nor more than there is."""
        duration_s = self._recording.duration_s
        limit_s = math.inf if duration_s is None else duration_s
        self._processed_s = max(self._processed_s, min(processed_s, limit_s))
        shown_s = None if duration_s is None else round(max(duration_s, self._processed_s), 3)
        progress = Progress(round(self._processed_s, 3), shown_s)
        if progress != self._told:
            self._told = progress
            self._on_progress(progress)

    def listening(self, info: Any) -> None:
        """Take note of what the model took a stretch's language for; it counts once somebody speaks."""
        if info is not None:
            self._detected = info.language, _finite(info.language_probability, otherwise=0.0)

    def add(self, segment: Segment, raw_text: str) -> None:
        if self._probability is None and self._detected is not None:
            self.language, self._probability = self._detected
        self._segments.append(segment)
        self._text += raw_text
        self.last = segment
        self._on_segment(segment)
        self.reached(segment.end_s)

    def close_window(self, until_s: float) -> Window:
        spoken = bool(self._segments)
        window = Window(
            number=len(self._windows),
            until_s=until_s,
            text=self._text,
            language=self.language if spoken else None,  # faster-whisper names one for silence, too
            language_probability=self._probability if spoken else None,
            segments=tuple(self._segments),
        )
        self._windows.append(window)
        self._segments, self._text = [], ""
        self.reached(until_s)
        return window

    def transcript(self, warnings: tuple[str, ...]) -> Transcript:
        spoken = self.last is not None
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


def _segment(raw: Any, stretch: Chunk, *, after: Segment | None) -> Segment:
    start_s = _inside(raw.start, stretch, otherwise=stretch.start_s)
    if after is not None:  # batched, a time may lie outside of the piece that it was heard in
        start_s = max(start_s, after.start_s)
    return Segment(
        id=1 if after is None else after.id + 1,
        start_s=start_s,
        end_s=max(start_s, _inside(raw.end, stretch, otherwise=start_s)),
        text=raw.text.strip(),
        avg_logprob=_finite(raw.avg_logprob, otherwise=_LEAST_LOGPROB),
        no_speech_prob=_finite(raw.no_speech_prob, otherwise=0.0),
        words=None if raw.words is None else tuple(_word(word, stretch) for word in raw.words),
    )


def _word(raw: Any, stretch: Chunk) -> Word:
    start_s = _inside(raw.start, stretch, otherwise=stretch.start_s)
    end_s = max(start_s, _inside(raw.end, stretch, otherwise=start_s))
    return Word(start_s=start_s, end_s=end_s, text=raw.word, probability=_finite(raw.probability, otherwise=0.0))


def _inside(time_s: float, stretch: Chunk, *, otherwise: float) -> float:
    """Give a time of the model as one of the file, of three decimals, not outside the stretch that it was heard in."""
    in_file_s = _finite(stretch.start_s + float(time_s), otherwise=otherwise)
    return min(max(round(stretch.start_s, 3), in_file_s), round(stretch.end_s, 3))


def _finite(value: float, *, otherwise: float) -> float:
    """Make a plain float of three decimals; some devices compute NaN, which JSON has no word for."""
    plain = float(value)
    return round(plain, 3) + 0.0 if math.isfinite(plain) else otherwise


def _stop_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Cancelled
