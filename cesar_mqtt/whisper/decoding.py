"""Whisper on one piece of audio, at most 30 s, or on several at once: encoding, decoding, and Whisper's own checks.

In place of faster-whisper's loops, which encode 30 s for each word. Nothing here changes after it was made, except a
cache: any number of threads may decode with one `PieceDecoder`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ctranslate2
import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import get_compression_ratio, get_suppressed_tokens

from cesar_mqtt.errors import Cancelled
from cesar_mqtt.whisper.encoder_input import FULL_FRAMES, is_noisy, padded
from cesar_mqtt.whisper.features import Features

WHISPER_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Whisper's own list, each tried where the result of the one before fails the checks."""
CERTAIN_ABOVE = 0.5
"""The probability from which a detected language counts."""
DOUBTFUL_BELOW = 0.35
"""The probability below which a language is detected again at full length. Above it, that takes ten times as long and
gives no better answer (docs/performance.md)."""

NO_SPEECH_ABOVE, _IMPROBABLE_BELOW, _REPETITIVE_ABOVE = 0.6, -1.0, 2.4
"""Whisper's own limits on `no_speech_prob`, `avg_logprob` and the compression ratio."""
_BEAMS, _UNSURE_BELOW = 5, -0.5
"""Of `beam_size` `auto`: a greedy result with a lower average log probability is decoded again, with so many beams."""
_CUT_ABOVE_FRAMES = 1000
"""From 10 s on, a piece that fails the checks is cut rather than decoded at higher temperatures."""
_REPEATED = 4
"""How often a text at the end of a repetitive result must stand there for it to be a loop of the model."""
_SAMPLES_OF_TEMPERATURE = 5
"""How many results are drawn at a temperature above 0; the most probable one counts (Whisper's `best_of`)."""
_TOKENS_AT_LEAST, _TOKENS_PER_S = 40, 40
"""More tokens than anyone can speak, also in a language with three of them for a letter: a loop of the model in a short
clip need not go on to Whisper's own limit."""
_FRAMES_STEP = 100
"""Lengths of encoder input are multiples of a second: oneDNN keeps what it compiles for each length, 0.2 MB a time."""
_LATEST_START = 50
"""In steps of 20 ms: where the first segment of a piece begins at the latest."""
_PREPENDED, _APPENDED = "\"'“¿([{-", "\"'.。,\uff0c!\uff01?\uff1f:\uff1a”)]}、"
"""Punctuation that belongs to the word after it, and to the one before it."""


class Language(NamedTuple):
    """Whisper's code, and how probable it is, 0 to 1."""

    code: str
    probability: float


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """What is the same for all pieces of a job.

    Attributes:
        task: `transcribe` or `translate`.
        beam_size: None: greedy, and again with a beam where the result is unsure.
        temperatures: at least one; each further one is tried where the one before fails Whisper's checks.
        hotwords: given to the model with every piece.
        word_timestamps: whether segments have words.
        language_given: whether the job gives the language; if not, it is detected again where a result is unsure.
        padding: frames after the content that the encoder is given; `FULL_FRAMES`: always 30 s.
    """

    task: str
    beam_size: int | None
    temperatures: tuple[float, ...]
    hotwords: str | None
    word_timestamps: bool
    language_given: bool
    padding: int


@dataclass(frozen=True, slots=True)
class Piece:
    """An encoded piece.

    Attributes:
        features: without padding.
        frames: how many the encoder was given.
        encoded: its output, as CTranslate2 takes it.
        language: as detected in it; None: not detected yet.
    """

    features: Features
    frames: int
    encoded: Any
    language: Language | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What the model made of a piece."""

    piece: Piece
    tokenizer: Tokenizer
    tokens: list[int]
    text: str
    avg_logprob: float
    no_speech_prob: float

    @property
    def is_repetitive(self) -> bool:
        return bool(get_compression_ratio(self.text) > _REPETITIVE_ABOVE)

    @property
    def fails(self) -> bool:
        """Whether Whisper would decode again at a higher temperature."""
        return self.is_repetitive or self.avg_logprob < _IMPROBABLE_BELOW

    @property
    def is_silence(self) -> bool:
        return self.avg_logprob < _IMPROBABLE_BELOW and self.no_speech_prob > NO_SPEECH_ABOVE

    @property
    def should_be_cut(self) -> bool:
        """Whether to decode a part of the piece instead: a shorter one often passes, and at temperature 0."""
        return self.fails and not self.is_silence and self.piece.features.shape[1] > _CUT_ABOVE_FRAMES

    @property
    def is_unsure(self) -> bool:
        return self.fails or self.avg_logprob < _UNSURE_BELOW


class PieceDecoder:
    """Encodes and decodes pieces with one model and the options of one job.

    Attributes:
        has_words: whether `split` returns the words of segments.
        detects_language: whether the request does not give the language.
    """

    def __init__(self, model: WhisperModel, options: DecodingOptions, should_stop: Callable[[], bool]) -> None:
        """Keep what is given; `should_stop` is asked before each step of the model, which then raises Cancelled."""
        self._model = model
        self._options = options
        self.has_words = options.word_timestamps
        self.detects_language = not options.language_given
        self._should_stop = should_stop
        self._tokenizers: dict[str, Tokenizer] = {}

    def encode(self, features: Features, *, frames: int | None = None) -> Piece:
        """Encode a piece, padded to so many frames; None: as many as it needs."""
        frames = self.frames_for(features) if frames is None else frames
        self._check_stop()
        return Piece(features, frames, self._model.encode(padded(features, frames)))

    def frames_for(self, features: Features) -> int:
        """Return how many frames the encoder needs for a piece."""
        frames = self._padded_length(features)
        return frames if frames < FULL_FRAMES and not is_noisy(features) else FULL_FRAMES

    def _padded_length(self, features: Features) -> int:
        frames = -(-(features.shape[1] + self._options.padding) // _FRAMES_STEP) * _FRAMES_STEP
        return min(int(frames), FULL_FRAMES)

    def detect_language(self, piece: Piece) -> Language:
        """Detect the language of a piece; an English-only model knows only one."""
        if not self._model.model.is_multilingual:
            return Language("en", 1.0)
        return self.languages(piece)[0]

    def languages(self, piece: Piece) -> list[Language]:
        """Return how probable each language is, the most probable one first."""
        self._check_stop()
        found = self._model.model.detect_language(piece.encoded)[0]
        return [Language(token[2:-2], probability) for token, probability in found]

    def decode(self, pieces: Sequence[Piece], languages: Sequence[str], prompts: Sequence[str | None]) -> list[Result]:
        """Decode pieces, all at once if they were padded to the same length; each until it passes Whisper's checks.

        Args:
            pieces: at least one.
            languages: of each piece.
            prompts: what comes before each piece; None: nothing.
        """
        first_temperature = self._options.temperatures[0]
        asked = [
            _Question(self._tokenizer(language), prompt) for language, prompt in zip(languages, prompts, strict=True)
        ]
        beams = self._options.beam_size or (_BEAMS if len(pieces) == 1 and self._is_hard(pieces[0]) else 1)
        first = self._generate(pieces, asked, first_temperature, beams)
        return [self._settle(result, question, beams) for result, question in zip(first, asked, strict=True)]

    def _is_hard(self, piece: Piece) -> bool:
        """Whether a greedy result will be decoded again anyway: noise hides the speech, or even the language."""
        needs_full_length = self._padded_length(piece.features) < piece.frames
        return needs_full_length or (piece.language is not None and piece.language.probability <= CERTAIN_ABOVE)

    def split(self, result: Result, offset_s: float) -> tuple[list[dict[str, Any]], int]:
        """Cut a result into faster-whisper's segments at the times that the model gave.

        Args:
            result: whose piece begins at `offset_s`.
            offset_s: added to the times.

        Returns:
            The segments, and how many frames of the piece they cover: what comes after is to be decoded next.
        """
        size = result.piece.features.shape[1]
        rate = self._model.frames_per_second
        seek = round(offset_s * rate)
        segments, end, ends_alone = self._model._split_segments_by_timestamps(  # noqa: SLF001 - it has no public name
            tokenizer=result.tokenizer,
            tokens=result.tokens,
            time_offset=offset_s,
            segment_size=size,
            segment_duration=size / rate,
            seek=seek,
        )
        if self._options.word_timestamps:
            self._add_words(result, segments)
            ends_s = [segment["words"][-1]["end"] for segment in segments if segment["words"]]
            if ends_s and not ends_alone and ends_s[-1] > offset_s:
                end = round(ends_s[-1] * rate)
        for segment in segments:
            segment["text"] = result.tokenizer.decode(segment["tokens"])
        return segments, end - seek if seek < end else size

    def align(self, result: Result, segments: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Return the words of each segment of a result, as faster-whisper's dictionaries."""
        copies = [dict(segment) for segment in segments]  # their times would be changed, too
        self._add_words(result, copies)
        return [copy["words"] for copy in copies]

    def _add_words(self, result: Result, segments: list[dict[str, Any]]) -> None:
        self._check_stop()
        frames = result.piece.features.shape[1]
        self._model.add_word_timestamps(
            [segments], result.tokenizer, result.piece.encoded, frames, _PREPENDED, _APPENDED, last_speech_timestamp=0.0
        )

    def _settle(self, result: Result, question: "_Question", used_beams: int) -> Result:
        """Return the first result that passes Whisper's checks, or the most probable one."""
        first, *further = self._options.temperatures
        beams = self._options.beam_size or _BEAMS
        is_short = result.piece.frames < FULL_FRAMES
        # What fails at its own length is decoded with a beam at full length below.
        if used_beams < beams and first == 0 and result.is_unsure and not (result.fails and is_short):
            result = max(result, *self._generate([result.piece], [question], first, beams), key=_rank)
        if result.is_unsure and not self._options.language_given:
            result = self._in_detected_language(result, question, beams)
        if not result.fails or (result.is_silence and not is_short):
            return result
        tried, piece = [result], result.piece
        if is_short:
            piece = self.encode(piece.features, frames=FULL_FRAMES)
            further.insert(0, first)
        question = _Question(result.tokenizer, question.prompt)
        is_searched = beams > 1 or first > 0
        for temperature in further:
            # A temperature prevents loops. A text that is improbable without one only becomes less probable with it.
            if temperature > first and (tried[-1].should_be_cut or (is_searched and not tried[-1].is_repetitive)):
                break
            tried += self._generate([piece], [question], temperature, beams)
            is_searched = is_searched or temperature > first
            if not tried[-1].fails or tried[-1].is_silence:
                return tried[-1]
        best = max(tried, key=_rank)
        return _without_loop(best) if best.is_repetitive and not best.should_be_cut else best

    def _in_detected_language(self, result: Result, question: "_Question", beams: int) -> Result:
        """Decode again if the piece is in another language than the one it was decoded in."""
        language = result.piece.language or self.detect_language(result.piece)
        if language.code == question.tokenizer.language_code or language.probability < CERTAIN_ABOVE:
            return result
        other = _Question(self._tokenizer(language.code), question.prompt)
        return max(result, *self._generate([result.piece], [other], self._options.temperatures[0], beams), key=_rank)

    def _generate(
        self, pieces: Sequence[Piece], asked: Sequence["_Question"], temperature: float, beams: int
    ) -> list[Result]:
        search: dict[str, Any] = {"beam_size": beams}
        if temperature > 0:
            search = {
                "beam_size": 1,
                "num_hypotheses": _SAMPLES_OF_TEMPERATURE,
                "sampling_topk": 0,
                "sampling_temperature": temperature,
            }
        self._check_stop()
        prompts = [self._prompt(question) for question in asked]
        seconds = max(piece.features.shape[1] for piece in pieces) / self._model.frames_per_second
        longest = max(map(len, prompts)) + _TOKENS_AT_LEAST + round(_TOKENS_PER_S * seconds)
        results = self._model.model.generate(
            pieces[0].encoded if len(pieces) == 1 else _joined(pieces),
            prompts,
            max_length=min(longest, self._model.max_length),
            return_scores=True,
            return_no_speech_prob=True,
            suppress_tokens=get_suppressed_tokens(asked[0].tokenizer, [-1]),
            max_initial_timestamp_index=_LATEST_START,
            **search,
        )
        return [
            _result(raw, piece, question.tokenizer) for raw, piece, question in zip(results, pieces, asked, strict=True)
        ]

    def _prompt(self, question: "_Question") -> list[int]:
        previous = [] if question.prompt is None else question.tokenizer.encode(" " + question.prompt.strip())
        tokens: list[int] = self._model.get_prompt(question.tokenizer, previous, hotwords=self._options.hotwords)
        return tokens

    def _tokenizer(self, language: str) -> Tokenizer:
        if language not in self._tokenizers:
            self._tokenizers[language] = Tokenizer(
                self._model.hf_tokenizer, self._model.model.is_multilingual, task=self._options.task, language=language
            )
        return self._tokenizers[language]

    def _check_stop(self) -> None:
        if self._should_stop():
            raise Cancelled


@dataclass(frozen=True, slots=True)
class _Question:
    """What the decoder is given beside a piece."""

    tokenizer: Tokenizer
    prompt: str | None


def _rank(result: Result) -> tuple[bool, float]:
    return not result.is_repetitive, result.avg_logprob


def _without_loop(result: Result) -> Result:
    """Cut what the model repeats to the end of the text, but for the first time."""
    begin = result.tokenizer.timestamp_begin
    tokens = [min(token, begin) for token in result.tokens]  # the times differ
    for length in range(1, len(tokens) // _REPEATED + 1):
        repeated = 0
        while repeated + length < len(tokens) and tokens[-1 - repeated] == tokens[-1 - repeated - length]:
            repeated += 1
        if repeated >= (_REPEATED - 1) * length:
            return replace(result, tokens=result.tokens[: len(tokens) - repeated])
    return result


def _joined(pieces: Sequence[Piece]) -> Any:
    encoded = [np.array(piece.encoded.to_device(ctranslate2.Device.cpu)) for piece in pieces]
    return ctranslate2.StorageView.from_array(np.concatenate(encoded))  # the model moves it to its own device


def _result(raw: Any, piece: Piece, tokenizer: Tokenizer) -> Result:
    tokens = raw.sequences_ids[0]
    return Result(
        piece=piece,
        tokenizer=tokenizer,
        tokens=tokens,
        text=tokenizer.decode(tokens).strip(),
        avg_logprob=raw.scores[0] * len(tokens) / (len(tokens) + 1),  # the end of the text counts as a token
        no_speech_prob=raw.no_speech_prob,
    )
