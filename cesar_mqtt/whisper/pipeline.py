"""How a Whisper model is asked for one job: which pipeline, with which settings, and what is kept away from it.

The settings are for audio that nobody watches over. Only the worker thread may call it.
"""

import re
from collections.abc import Callable
from typing import Any

from faster_whisper import WhisperModel

from cesar_mqtt.audio.decoder import Samples
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.transcript import MAX_PROMPT_CHARACTERS, TranscriptionOptions
from cesar_mqtt.whisper.batched import Lazy, listen_batched
from cesar_mqtt.whisper.interruptible import interruptible

_MAX_TOKENS = 100
"""Of the prompt, and of the hotwords: together they have to leave room in Whisper's 448 tokens for what is heard."""
_CONTROL_TOKEN = re.compile(r"<\|.*?\|>", re.DOTALL)
_LANGUAGE_DETECTION_SEGMENTS = 4
"""Stretches of 30 s that are listened to until one is clear: the first is often music or silence."""
_MOST_AT_ONCE = {"cpu": 8}
"""On a CPU, more at once are no faster, but a stop has to wait for all of them."""


class Pipeline:
    """One job's way to hear with a model.

    Attributes:
        warnings: `initial_prompt_truncated`, `hotwords_truncated`.
    """

    def __init__(
        self, model: WhisperModel, options: TranscriptionOptions, *, device: str, should_stop: Callable[[], bool]
    ) -> None:
        """Prepare; nothing is heard yet.

        Args:
            model: the model that the options name.
            options: what the producer chose.
            device: where the model runs, `cpu` or `cuda`.
            should_stop: asked before each step of the model.

        Raises:
            JobFailedError: `invalid_request` for what this model cannot do.
        """
        _check_abilities(model, options)
        prompt, prompt_cut = _capped(model, options.initial_prompt, kept=slice(-_MAX_TOKENS, None))
        hotwords, hotwords_cut = _capped(model, options.hotwords, kept=slice(_MAX_TOKENS))
        found = {"initial_prompt_truncated": prompt_cut, "hotwords_truncated": hotwords_cut}
        self.warnings = tuple(name for name, is_so in found.items() if is_so)
        self._model = interruptible(model, should_stop)
        self._options = options
        self._at_once = min(options.batch_size, _MOST_AT_ONCE.get(device, options.batch_size))
        self._asked: dict[str, Any] = {
            "task": options.task,
            "beam_size": options.beam_size,
            "initial_prompt": prompt,
            "hotwords": hotwords,
            "word_timestamps": options.word_timestamps,
            "language_detection_segments": _LANGUAGE_DETECTION_SEGMENTS,
        }
        if options.temperature is not None:
            self._asked["temperature"] = options.temperature

    def listen(self, samples: Samples, language: str | None) -> tuple[Lazy, Any]:
        """Begin with a stretch; VAD, features and language happen in this call, each segment when it is asked for.

        The prompt leads the model at the start of each stretch, the hotwords in each 30 s.

        Args:
            samples: at least one.
            language: the one to listen for; None: detect it.

        Returns:
            faster-whisper's segments, with times from the start of the samples, and its `TranscriptionInfo`, or None
            where nothing is to be heard.

        Raises:
            Cancelled: as soon as `should_stop` returns True; so do the segments.
        """
        options = self._options
        if options.batch_size > 1:
            return listen_batched(
                self._model,
                samples,
                language,
                vad_filter=options.vad_filter,
                at_once=self._at_once,
                asked=self._asked,
            )
        lazy: Lazy
        # The fallback list of temperatures stays faster-whisper's, if none was chosen. Text is not conditioned on what
        # came before: one repetition would otherwise be carried through the rest of the stretch.
        lazy, info = self._model.transcribe(
            samples,
            language=language,
            vad_filter=options.vad_filter,
            condition_on_previous_text=False,
            **self._asked,
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


def _capped(model: WhisperModel, text: str | None, *, kept: slice) -> tuple[str | None, bool]:
    """Keep as much of a text as the model has room for, counted in its tokens, and say whether some had to go.

    Whisper's control tokens, which could be spelt out in the text, are taken out of it.
    """
    plain = _without_control_tokens((text or "").encode(errors="ignore").decode())
    if not plain:
        return None, False
    looked_at = plain[:MAX_PROMPT_CHARACTERS] if kept.start is None else plain[-MAX_PROMPT_CHARACTERS:]
    tokens = model.hf_tokenizer.encode(" " + looked_at, add_special_tokens=False).ids
    if len(tokens) <= _MAX_TOKENS and looked_at == plain:
        return " " + plain, False
    # A character that was cut in two comes out as the replacement character.
    return " " + model.hf_tokenizer.decode(tokens[kept]).strip("\ufffd").strip(), True


def _without_control_tokens(text: str) -> str:
    """Take them out until there are none: what is left may come together to another one."""
    while (rest := _CONTROL_TOKEN.sub("", text)) != text:
        text = rest
    return text.strip()
