"""The faster-whisper call of one job: which pipeline, with which options, and the limits on prompts.

The options suit audio that is transcribed unattended.
"""

import re
from collections.abc import Callable
from typing import Any

from faster_whisper import WhisperModel

from cesar_mqtt.audio.decoder import Samples
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.transcript import MAX_PROMPT_CHARACTERS, TranscriptionOptions
from cesar_mqtt.whisper.batched import RawSegments, transcribe_batched
from cesar_mqtt.whisper.interruptible import interruptible

_MAX_TOKENS = 100
"""Of the prompt, and of the hotwords: together they must leave room in Whisper's 448 tokens for the transcript."""
_CONTROL_TOKEN = re.compile(r"<\|.*?\|>", re.DOTALL)
_LANGUAGE_DETECTION_SEGMENTS = 4
"""How many 30 s segments are tried until one is certain: the first is often music or silence."""
_MAX_BATCH_SIZE = {"cpu": 8}
"""On a CPU larger batches are no faster, and a cancel has to wait for the whole batch."""


class Pipeline:
    """Transcribes the chunks of one job; several threads may transcribe one each at once.

    Attributes:
        detects_language: whether the model knows several languages and the job names none.
        warnings: `initial_prompt_truncated`, `hotwords_truncated`.
    """

    def __init__(
        self, model: WhisperModel, options: TranscriptionOptions, *, device: str, should_stop: Callable[[], bool]
    ) -> None:
        """Check the options against the model; nothing is transcribed yet.

        Args:
            model: the model that the options name.
            options: of the job.
            device: where the model runs, `cpu` or `cuda`.
            should_stop: asked before each step of the model.

        Raises:
            JobFailedError: `invalid_request` for what this model cannot do.
        """
        _check_abilities(model, options)
        prompt, prompt_cut = _cut_to_tokens(model, options.initial_prompt, kept=slice(-_MAX_TOKENS, None))
        hotwords, hotwords_cut = _cut_to_tokens(model, options.hotwords, kept=slice(_MAX_TOKENS))
        found = {"initial_prompt_truncated": prompt_cut, "hotwords_truncated": hotwords_cut}
        self.warnings = tuple(name for name, is_so in found.items() if is_so)
        self.detects_language: bool = options.language is None and model.model.is_multilingual
        self._model = interruptible(model, should_stop)
        self._vad_filter = options.vad_filter
        self._batched = options.batch_size > 1
        self._batch_size = min(options.batch_size, _MAX_BATCH_SIZE.get(device, options.batch_size))
        self._options: dict[str, Any] = {
            "task": options.task,
            "beam_size": options.beam_size,
            "initial_prompt": prompt,
            "hotwords": hotwords,
            "word_timestamps": options.word_timestamps,
            "language_detection_segments": _LANGUAGE_DETECTION_SEGMENTS,
        }
        if options.temperature is not None:
            self._options["temperature"] = options.temperature

    def transcribe(self, samples: Samples, language: str | None) -> tuple[RawSegments, Any]:
        """Start a chunk: VAD, features and language detection run in this call, decoding as segments are taken.

        The model gets the prompt at the start of each chunk, the hotwords with each 30 s.

        Args:
            samples: at least one.
            language: of the speech; None: detect it.

        Returns:
            faster-whisper's segments, with times from the start of the samples, and its `TranscriptionInfo`, or None if
            there is no speech.

        Raises:
            Cancelled: `should_stop` returned True; the segments raise it as well.
        """
        if self._batched:
            return transcribe_batched(
                self._model,
                samples,
                language,
                vad_filter=self._vad_filter,
                batch_size=self._batch_size,
                options=self._options,
            )
        segments: RawSegments
        # If the job gives no temperature, faster-whisper's own fallback list stays. Text is not conditioned on previous
        # text: a single repetition would otherwise go on through the rest of the chunk.
        segments, info = self._model.transcribe(
            samples,
            language=language,
            vad_filter=self._vad_filter,
            condition_on_previous_text=False,
            **self._options,
        )
        return segments, info


def _check_abilities(model: WhisperModel, options: TranscriptionOptions) -> None:
    language, name = options.language, options.model_size
    if not model.model.is_multilingual and (options.task == "translate" or language not in {None, "en"}):
        fault = "cannot translate" if options.task == "translate" else f"does not know the language {language!r}"
        raise JobFailedError(
            ErrorCode.INVALID_REQUEST,
            f"The model {name!r} is English-only and {fault}: choose a model whose name does not end in '.en'.",
        )
    # Older multilingual models have no token for the newest languages, and would then detect another.
    if language is not None and model.model.is_multilingual and not _has_token(model, language):
        raise JobFailedError(
            ErrorCode.INVALID_REQUEST,
            f"The model {name!r} does not know the language {language!r}: leave it out to have it detected.",
        )


def _has_token(model: WhisperModel, language: str) -> bool:
    return language in model.supported_languages and model.hf_tokenizer.token_to_id(f"<|{language}|>") is not None


def _cut_to_tokens(model: WhisperModel, text: str | None, *, kept: slice) -> tuple[str | None, bool]:
    """Cut a text to `_MAX_TOKENS` of the model's tokens, and return whether anything was cut.

    Whisper's control tokens, which the text may spell out, are removed from it.
    """
    plain = _without_control_tokens((text or "").encode(errors="ignore").decode())
    if not plain:
        return None, False
    considered = plain[:MAX_PROMPT_CHARACTERS] if kept.start is None else plain[-MAX_PROMPT_CHARACTERS:]
    tokens = model.hf_tokenizer.encode(" " + considered, add_special_tokens=False).ids
    if len(tokens) <= _MAX_TOKENS and considered == plain:
        return " " + plain, False
    # A character that was cut in two is decoded as the replacement character.
    return " " + model.hf_tokenizer.decode(tokens[kept]).strip("\ufffd").strip(), True


def _without_control_tokens(text: str) -> str:
    """Remove them until there are none: what remains may join to another one."""
    while (shorter := _CONTROL_TOKEN.sub("", text)) != text:
        text = shorter
    return text.strip()
