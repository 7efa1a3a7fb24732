"""From an audio file to a transcript, with settings for audio that nobody watches over.

Knows nothing of jobs or MQTT; only the worker thread may call it. Progress is told, and whether to stop is asked,
through two callbacks that run on that same thread.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from faster_whisper import WhisperModel

from cesar_mqtt import logs
from cesar_mqtt.audio import SAMPLE_RATE, AudioLimits, Samples, open_audio
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.models import ModelStore, is_out_of_memory

_log = logging.getLogger(__name__)

_MAX_PROMPT_TOKENS = 100
"""A longer prompt, with hotwords beside it, leaves no room in Whisper's 448 tokens for what is heard."""
_LANGUAGE_DETECTION_SEGMENTS = 4
"""Stretches of 30 s that are listened to until one is clear: the first is often music or silence."""
_LEAST_LOGPROB = -100.0

_Lazy: TypeAlias = Generator[Any, None, None]
"""faster-whisper's segments, each made when it is asked for."""


@dataclass(frozen=True, slots=True)
class TranscriptionOptions:
    """What a producer may choose.

    Attributes:
        model_size: a name that the model store knows.
        language: Whisper's code of the language; None: detected.
        task: `transcribe`, or `translate` into English.
        initial_prompt: words that lead the model to a spelling or style; its last 100 tokens count.
        beam_size: how many hypotheses are followed, 1 to 10.
        vad_filter: whether what is not speech is cut out first, so that nothing is made up for silence.
    """

    model_size: str
    language: str | None = None
    task: str = "transcribe"
    initial_prompt: str | None = None
    beam_size: int = 5
    vad_filter: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech; times in seconds from the start of the file, `start_s` <= `end_s` <= its duration.

    Attributes:
        id: counts from 1.
        text: without blanks around it.
        avg_logprob: mean log probability of the tokens, 0 at best; always a finite number.
        no_speech_prob: 0 to 1, the model's belief that nobody speaks in the 30 s around.
    """

    id: int
    start_s: float
    end_s: float
    text: str
    avg_logprob: float
    no_speech_prob: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transcription is: `processed_s` never goes back and never passes `audio_duration_s`."""

    processed_s: float
    audio_duration_s: float


@dataclass(frozen=True, slots=True)
class Transcript:
    """The result.

    Attributes:
        text: all segments, without blanks around it; empty if nobody spoke.
        language: Whisper's code; None if nobody spoke.
        language_probability: 1.0 if the language was given, or is the model's only one; None if nobody spoke.
        no_speech: whether nobody spoke.
        audio_duration_s: seconds of audio that could be decoded.
        segments: in order of time.
        warnings: `audio_truncated`, `audio_damaged`, `initial_prompt_truncated`.
    """

    text: str
    language: str | None
    language_probability: float | None
    no_speech: bool
    audio_duration_s: float
    segments: tuple[Segment, ...]
    warnings: tuple[str, ...]


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The transcription was ended because `should_stop` said so; what it had is dropped."""


class Transcriber:
    """Turns audio files into transcripts, one at a time. Only for the worker thread."""

    def __init__(self, models: ModelStore, audio: AudioSettings) -> None:
        self._models = models
        self._limits = AudioLimits(max_bytes=audio.max_bytes, max_duration_s=audio.max_duration)

    def warm_up(self, model_size: str) -> None:
        """Load a model ahead of the first job that needs it.

        Raises:
            JobFailedError: `model_unavailable`.
        """
        self._models.load(model_size)

    def transcribe(
        self,
        path: Path,
        options: TranscriptionOptions,
        *,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> Transcript:
        """Transcribe one file.

        Args:
            path: absolute and without symbolic links, as `audio.open_audio` wants it.
            options: what the producer chose.
            on_progress: called once as soon as the duration is known, and then with each segment.
            should_stop: asked while decoding, before the model starts and after each segment.

        Raises:
            JobFailedError: `audio_*` for the file, `model_unavailable` for the model, `invalid_request` for what this
                model cannot do, `internal` for a model that fails on the way.
            Stopped: `should_stop` returned True.
        """
        samples, warnings = self._decode(path, should_stop)
        duration_s = round(len(samples) / SAMPLE_RATE, 3)
        on_progress(Progress(0.0, duration_s))
        model = self._models.load(options.model_size)
        _check_abilities(model, options)
        prompt, cut = _prompt_tokens(model, options.initial_prompt)
        if cut:
            warnings = (*warnings, "initial_prompt_truncated")
        _stop_if(should_stop)

        with self._blaming(options.model_size):
            raw_segments, info = _start(model, samples, options, prompt)
        segments: list[Segment] = []
        text, processed_s = "", 0.0
        with closing(self._heard(raw_segments, options.model_size, duration_s)) as heard:
            for segment, raw_text in heard:
                segments.append(segment)
                text += raw_text
                processed_s = max(processed_s, segment.end_s)
                on_progress(Progress(processed_s, duration_s))
                _stop_if(should_stop)
        return _transcript(segments, text, info, duration_s=duration_s, warnings=warnings)

    def _decode(self, path: Path, should_stop: Callable[[], bool]) -> tuple[Samples, tuple[str, ...]]:
        blocks = []
        with open_audio(path, self._limits) as audio:
            for block in audio.blocks():
                blocks.append(block)
                _stop_if(should_stop)
            return np.concatenate(blocks), audio.warnings

    def _heard(
        self, raw_segments: _Lazy, model_size: str, duration_s: float
    ) -> Generator[tuple[Segment, str], None, None]:
        """Give each segment with its text as the model has it, whose leading blank joins it to the one before."""
        number = 0
        with closing(raw_segments), self._blaming(model_size):
            for raw in raw_segments:
                if raw.start < duration_s:  # Whisper fills up to 30 s with silence, and may hear something in it
                    number += 1
                    yield _segment(raw, number=number, duration_s=duration_s), raw.text

    @contextmanager
    def _blaming(self, model_size: str) -> Iterator[None]:
        """Tell what goes wrong inside the model from what is wrong with the audio, and start afresh the next time."""
        try:
            yield
        except (MemoryError, RuntimeError, ValueError) as exc:
            self._models.unload()
            reason = "ran out of memory" if is_out_of_memory(exc) else "failed"
            logs.event(_log, logging.WARNING, "model_failed", "Model %s %s: %s", model_size, reason, exc)
            raise JobFailedError(
                ErrorCode.INTERNAL,
                f"The model {model_size!r} {reason} while it transcribed; the audio itself could be read: retry, or "
                "choose a smaller model.",
            ) from exc


def _start(
    model: WhisperModel, samples: Samples, options: TranscriptionOptions, prompt: list[int] | None
) -> tuple[_Lazy, Any]:
    """Begin; only the segments are lazy, everything before them happens in this call.

    The fallback list of temperatures stays faster-whisper's. Text is not conditioned on what came before: one
    repetition would otherwise be carried through the rest of the file.
    """
    lazy: _Lazy
    lazy, info = model.transcribe(
        samples,
        language=options.language,
        task=options.task,
        beam_size=options.beam_size,
        initial_prompt=prompt,
        vad_filter=options.vad_filter,
        condition_on_previous_text=False,
        language_detection_segments=_LANGUAGE_DETECTION_SEGMENTS,
    )
    return lazy, info


def _check_abilities(model: WhisperModel, options: TranscriptionOptions) -> None:
    language, name = options.language, options.model_size
    if not model.model.is_multilingual and (options.task == "translate" or language not in {None, "en"}):
        wish = "cannot translate" if options.task == "translate" else f"does not know the language {language!r}"
        raise JobFailedError(
            ErrorCode.INVALID_REQUEST,
            f"The model {name!r} is English-only and {wish}: choose a model whose name does not end in '.en'.",
        )
    # Older multilingual models have no token for the newest languages, and would then detect one.
    if language is not None and model.model.is_multilingual and not _has_token(model, language):
        raise JobFailedError(
            ErrorCode.INVALID_REQUEST,
            f"The model {name!r} does not know the language {language!r}: leave it out to have it detected.",
        )


def _has_token(model: WhisperModel, language: str) -> bool:
    return language in model.supported_languages and model.hf_tokenizer.token_to_id(f"<|{language}|>") is not None


def _prompt_tokens(model: WhisperModel, prompt: str | None) -> tuple[list[int] | None, bool]:
    """Turn a prompt into at most `_MAX_PROMPT_TOKENS` tokens, the last ones, and say whether some had to go.

    Whisper's control tokens, which could be spelt out in the text, are left out: they all come after the words.
    """
    if prompt is None or not prompt.strip():
        return None, False
    end_of_text = model.hf_tokenizer.token_to_id("<|endoftext|>")
    encoded = model.hf_tokenizer.encode(" " + prompt.strip(), add_special_tokens=False)
    tokens = [token for token in encoded.ids if token < end_of_text]
    return tokens[-_MAX_PROMPT_TOKENS:] or None, len(tokens) > _MAX_PROMPT_TOKENS


def _transcript(
    segments: list[Segment], text: str, info: Any, *, duration_s: float, warnings: tuple[str, ...]
) -> Transcript:
    # faster-whisper names a language for silence, too.
    return Transcript(
        text=text.strip(),
        language=info.language if segments else None,
        language_probability=_finite(info.language_probability, otherwise=0.0) if segments else None,
        no_speech=not segments,
        audio_duration_s=duration_s,
        segments=tuple(segments),
        warnings=warnings,
    )


def _segment(raw: Any, *, number: int, duration_s: float) -> Segment:
    start_s = min(max(0.0, _finite(raw.start, otherwise=0.0)), duration_s)
    return Segment(
        id=number,
        start_s=start_s,
        end_s=min(max(start_s, _finite(raw.end, otherwise=start_s)), duration_s),
        text=raw.text.strip(),
        avg_logprob=_finite(raw.avg_logprob, otherwise=_LEAST_LOGPROB),
        no_speech_prob=_finite(raw.no_speech_prob, otherwise=0.0),
    )


def _finite(value: float, *, otherwise: float) -> float:
    """Make a plain float of three decimals; some devices compute NaN, which JSON has no word for."""
    plain = float(value)
    return round(plain, 3) + 0.0 if math.isfinite(plain) else otherwise


def _stop_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Stopped
