"""The options of one job as Whisper takes them, the limits on prompts, and the ranges of a chunk that are decoded.

The options suit audio that is transcribed unattended. A pipeline never changes: any number of threads may transcribe
with it at once, each one chunk.
"""

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from faster_whisper import WhisperModel

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.audio.vad import SILENT_BELOW, Range, speech_probabilities
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.transcript import MAX_PROMPT_CHARACTERS, TranscriptionOptions
from cesar_mqtt.whisper.chunk import ChunkDecoder, RawSegment
from cesar_mqtt.whisper.decoding import NO_SPEECH_ABOVE, WHISPER_TEMPERATURES, DecodingOptions, Language, PieceDecoder
from cesar_mqtt.whisper.encoder_input import FULL_FRAMES, padding_frames

_MAX_TOKENS = 100
"""Of the prompt, and of the hotwords: together they must leave room in Whisper's 448 tokens for the transcript."""
_CONTROL_TOKEN = re.compile(r"<\|.*?\|>", re.DOTALL)
PIECE_S = 30.0
"""What the model decodes at once, at most."""
_BATCHING_DEVICES = frozenset({"cuda"})
"""Where several pieces at once are faster than one after the other. On a CPU they are not (docs/performance.md): there
its cores transcribe several windows at once."""


def uses_batches(device: str) -> bool:
    """Whether `batch_size` makes a device decode several pieces at once."""
    return device in _BATCHING_DEVICES


class Pipeline:
    """Transcribes the chunks of one job.

    Attributes:
        warnings: `initial_prompt_truncated`, `hotwords_truncated`, `language_assumed`.
        detects_language: whether the language of the first chunk with speech is to be given with all others.
    """

    def __init__(
        self,
        model: WhisperModel,
        options: TranscriptionOptions,
        *,
        device: str,
        should_stop: Callable[[], bool],
        short_encoder_input: bool = True,
    ) -> None:
        """Check the options against the model; nothing is transcribed yet.

        Args:
            model: the model that the options name.
            options: of the job.
            device: where the model runs, `cpu` or `cuda`.
            should_stop: asked before each step of the model.
            short_encoder_input: whether audio shorter than 30 s is encoded at its own length.

        Raises:
            JobFailedError: `invalid_request` for what this model cannot do.
        """
        _check_abilities(model, options)
        prompt, prompt_cut = _cut_to_tokens(model, options.initial_prompt, kept=slice(-_MAX_TOKENS, None))
        hotwords, hotwords_cut = _cut_to_tokens(model, options.hotwords, kept=slice(_MAX_TOKENS))
        found = {
            "initial_prompt_truncated": prompt_cut,
            "hotwords_truncated": hotwords_cut,
            "language_assumed": options.language is None and not model.model.is_multilingual,
        }
        self.warnings = tuple(name for name, is_so in found.items() if is_so)
        self._model = model
        self._should_stop = should_stop
        self._vad_filter = options.vad_filter
        self._prompt = prompt
        self._multilingual = options.multilingual and model.model.is_multilingual
        self._language = options.language
        self.detects_language = options.language is None and model.model.is_multilingual and not self._multilingual
        self._batch_size = options.batch_size if uses_batches(device) else 1
        decoding = DecodingOptions(
            task=options.task,
            beam_size=None if options.beam_size == "auto" else options.beam_size,
            temperatures=options.temperatures or WHISPER_TEMPERATURES,
            hotwords=hotwords,
            word_timestamps=options.word_timestamps,
            language_given=options.language is not None or not model.model.is_multilingual,
            padding=padding_frames(model) if short_encoder_input else FULL_FRAMES,
        )
        self._decoder = PieceDecoder(model, decoding, should_stop)

    def transcribe(
        self, samples: Samples, speech: Sequence[Range], language: str | None
    ) -> tuple[Generator[RawSegment, None, None], Language | None]:
        """Start a chunk: features and language detection run in this call, decoding as segments are taken.

        The model gets the prompt at the start of each chunk, the hotwords with each 30 s.

        Args:
            samples: at least one.
            speech: the ranges of the samples that are decoded, each by itself.
            language: of the speech; None: detect it.

        Returns:
            The segments, with times from the start of the samples, and the language; None if there is no speech, or if
            an English-only model was given none.

        Raises:
            Cancelled: `should_stop` returned True; the segments raise it as well.
        """
        chunk = ChunkDecoder(
            self._decoder,
            self._model.feature_extractor,
            samples,
            speech,
            language=self._language if self._multilingual else language,
            multilingual=self._multilingual,
            batch_size=self._batch_size,
            prompt=self._prompt,
            should_stop=self._should_stop,
        )
        segments = chunk.segments() if self._vad_filter else _without_inventions(chunk.segments(), samples)
        return segments, None if "language_assumed" in self.warnings else chunk.language


def _without_inventions(
    segments: Generator[RawSegment, None, None], samples: Samples
) -> Generator[RawSegment, None, None]:
    """Drop what the model invented where it heard no speech itself, nor does the VAD: Whisper is often sure of it."""
    with closing(segments):
        for segment in segments:
            heard = samples[int(segment.start * SAMPLE_RATE) : int(segment.end * SAMPLE_RATE)]
            if segment.no_speech_prob < NO_SPEECH_ABOVE or speech_probabilities(heard).max(initial=0.0) >= SILENT_BELOW:
                yield segment


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
