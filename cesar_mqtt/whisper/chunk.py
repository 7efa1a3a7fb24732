"""Decoding of the speech in a chunk: no segment and no word spans the silence between two ranges of it.

Ranges that are near to each other are decoded together, without the silence: the model understands a sentence with a
pause in it better as a whole (docs/performance.md). What it takes for one segment is cut where the silence was.

A `ChunkDecoder` belongs to the thread that decodes its chunk; several may use one `PieceDecoder`.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from faster_whisper.feature_extractor import FeatureExtractor

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.audio.vad import Range, find_cut, speech_probabilities, split
from cesar_mqtt.whisper.decoding import CERTAIN_ABOVE, DOUBTFUL_BELOW, Language, Piece, PieceDecoder, Result
from cesar_mqtt.whisper.encoder_input import FULL_FRAMES
from cesar_mqtt.whisper.features import HOP_SAMPLES, Features, log_mel
from cesar_mqtt.whisper.timeline import Timeline, join_near

_FRAMES_PER_S = SAMPLE_RATE // HOP_SAMPLES
_DETECTION_PIECES = 4
"""In how many pieces the language is detected until one is certain: the first is often music."""
_UTTERANCE = 8 * SAMPLE_RATE
"""Where the language may change, it is detected in parts of at most this length."""
_LEAST_UTTERANCE = 2 * SAMPLE_RATE
"""In a shorter one the language is guessed."""
_CHANGES_FROM_FRAMES = 1000
"""10 s: in a longer piece the language may change, although the request does not say so."""
_RIVAL_ABOVE, _SURE_ABOVE = 0.15, 0.8
"""A piece in which a second language is so probable may hold two; an utterance that is so surely in another language
than the recording is in that one."""
_JOINED_GAP = 8 * SAMPLE_RATE
"""Ranges with a longer gap between them are decoded apart."""
_MIN_REMAINDER_FRAMES = 20
"""A shorter remainder can hold no word."""


@dataclass(slots=True)
class RawWord:
    """A word with the blank before it, in seconds from the start of the chunk."""

    start: float
    end: float
    word: str
    probability: float


@dataclass(slots=True)
class RawSegment:
    """What the model gave: seconds from the start of the chunk, the text with its leading blank."""

    start: float
    end: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    words: list[RawWord] | None


@dataclass(slots=True)
class _Speech:
    """Ranges of speech that are decoded together.

    Attributes:
        timeline: where they lie in the chunk.
        features: of the samples of the ranges.
        language: None: not known yet.
        prompt: for its next piece.
        first: the first piece, if it was encoded for the detection.
        seek: how many frames are decoded.
        limit: the most frames of the next piece.
        found: segments that were not yielded yet.
    """

    timeline: Timeline
    features: Features
    language: str | None = None
    prompt: str | None = None
    first: Piece | None = None
    seek: int = 0
    limit: int = FULL_FRAMES
    found: list[RawSegment] = field(default_factory=list)

    @property
    def is_decoded(self) -> bool:
        frames: int = self.features.shape[1]
        return frames - self.seek < (_MIN_REMAINDER_FRAMES if self.seek else 1)

    @property
    def next_features(self) -> Features:
        """Of the next piece."""
        return self.features[:, self.seek : self.seek + self.limit]


class ChunkDecoder:
    """Decodes one chunk.

    Attributes:
        language: of the speech, as given or detected; None: there is no speech.
    """

    def __init__(
        self,
        decoder: PieceDecoder,
        extractor: FeatureExtractor,
        samples: Samples,
        speech: Sequence[Range],
        *,
        language: str | None,
        multilingual: bool,
        batch_size: int,
        prompt: str | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Compute the features, and detect the language if it is not given or may change.

        Args:
            decoder: for the pieces.
            extractor: of the model.
            samples: of the chunk.
            speech: ranges of the samples, in order; what lies between them is left out.
            language: None: detect it.
            multilingual: whether the language may change within the chunk.
            batch_size: how many pieces are decoded at once.
            prompt: for the first piece.
            should_stop: asked before each step.

        Raises:
            Cancelled: `should_stop` returned True; the segments raise it as well.
        """
        self._decoder = decoder
        self._extractor = extractor
        self._samples = samples
        self._should_stop = should_stop
        self._batch_size = batch_size
        self._may_change = decoder.detects_language and not multilingual
        self._heard: set[str] = set()
        """The languages of the chunk, as far as it is known that there are several."""
        self.language: Language | None = None if language is None else Language(language, 1.0)
        ranges = [(start, end) for start, end in speech if end - start >= HOP_SAMPLES]
        if multilingual:
            self._speech = self._detect_languages(ranges)
        else:
            if batch_size > 1:
                ranges = self._cut(ranges, FULL_FRAMES * HOP_SAMPLES)
            self._speech = [self._compute(group) for group in self._join(ranges)]
            if self.language is None and self._speech:
                self.language = self._detect_language()
        if not self._speech:
            self.language = None
        else:
            self._speech[0].prompt = prompt

    def segments(self) -> Generator[RawSegment, None, None]:
        """Decode; yields each segment once all before it are known."""
        waiting, unyielded = deque(self._speech), deque(self._speech)
        while waiting:
            group = [waiting.popleft() for _ in range(min(self._batch_size, len(waiting)))]
            self._decode_next(group)
            waiting.extendleft(speech for speech in reversed(group) if not speech.is_decoded)
            while unyielded:
                found, unyielded[0].found = unyielded[0].found, []
                yield from found
                if not unyielded[0].is_decoded:
                    break
                unyielded.popleft()

    def _decode_next(self, group: Sequence[_Speech]) -> None:
        """Decode the next piece of each range, and add its segments."""
        frames = max(
            self._decoder.frames_for(speech.next_features) if speech.first is None else speech.first.frames
            for speech in group
        )
        pieces = [
            speech.first
            if speech.first is not None and speech.first.frames == frames
            else self._decoder.encode(speech.next_features, frames=frames)
            for speech in group
        ]
        default = "en" if self.language is None else self.language.code
        languages = [speech.language or default for speech in group]
        if self._may_change and len(group) == 1 and pieces[0].features.shape[1] >= _CHANGES_FROM_FRAMES:
            pieces[0], languages[0] = self._in_one_language(group[0], pieces[0], default)
        results = self._decoder.decode(pieces, languages, [speech.prompt for speech in group])
        for speech, result in zip(group, results, strict=True):
            self._add(speech, result)
            speech.first = None

    def _in_one_language(self, speech: _Speech, piece: Piece, default: str) -> tuple[Piece, str]:
        """Return the next piece of a range, or its beginning if the language changes in it, and its language."""
        first, second, *_ = self._decoder.languages(piece)
        if second.probability < _RIVAL_ABOVE and first.code == default:
            return piece, default
        if second.probability < _RIVAL_ABOVE and first.probability >= _SURE_ABOVE:
            return piece, first.code
        begin, frames = speech.seek * HOP_SAMPLES, piece.features.shape[1]
        samples = speech.timeline.join(self._samples)[begin : begin + frames * HOP_SAMPLES]
        utterances = split(samples, _UTTERANCE, search_window=_UTTERANCE)
        heard = [
            {
                language.code: language.probability
                for language in self._decoder.languages(
                    self._decoder.encode(piece.features[:, start // HOP_SAMPLES : max(start + 1, end) // HOP_SAMPLES])
                )
            }
            for start, end in utterances
        ]
        sure = {
            code
            for (start, end), found in zip(utterances, heard, strict=True)
            for code, probability in found.items()
            if probability >= _SURE_ABOVE and end - start >= _LEAST_UTTERANCE
        }
        self._heard |= {default, *sure}
        codes = [max(self._heard, key=lambda code: found.get(code, 0.0)) for found in heard]
        same = next((number for number, code in enumerate(codes) if code != codes[0]), None)
        if same is None:
            return piece, codes[0]
        speech.limit = utterances[same][0] // HOP_SAMPLES
        return self._decoder.encode(speech.next_features), codes[0]

    def _add(self, speech: _Speech, result: Result) -> None:
        """Add the segments of a piece to its range; if the piece is to be cut, only limit the next one."""
        if result.should_be_cut:
            first = speech.seek * HOP_SAMPLES
            samples = speech.timeline.join(self._samples)
            most = samples[first : first + result.piece.features.shape[1] * HOP_SAMPLES * 2 // 3]
            cut = find_cut(most, speech_probabilities(most), search_window=len(most))
            speech.limit = cut // HOP_SAMPLES
            return
        speech.limit, speech.prompt = min(2 * speech.limit, FULL_FRAMES), None  # what follows may fail as well
        if result.is_silence:
            speech.seek += result.piece.features.shape[1]
            return
        segments, frames = self._decoder.split(result, speech.seek / _FRAMES_PER_S)
        # The model hears silence after the speech, and may make up text for it.
        segments = [
            one for one in segments if one["text"].strip() and one["start"] < min(one["end"], speech.timeline.length_s)
        ]
        reached = [speech.timeline.ranges_of(one["start"], one["end"]) for one in segments]
        words: Sequence[Sequence[Mapping[str, Any]] | None] = [one.get("words") for one in segments]
        if not self._decoder.has_words and any(len(numbers) > 1 for numbers in reached):
            words = self._decoder.align(result, segments)
        for segment, numbers, spoken in zip(segments, reached, words, strict=True):
            if len(numbers) > 1 and spoken:
                speech.found += _cut_apart(segment, spoken, result, speech.timeline, keep_words="words" in segment)
            else:
                speech.found.append(_segment(segment, segment.get("words"), result, speech.timeline, numbers[0]))
        speech.seek += frames

    def _detect_language(self) -> Language:
        """Detect it in the first 30 s of speech, and in further ones until one is certain."""
        first = self._speech[0]
        features = np.concatenate([speech.features for speech in self._speech], axis=1)
        votes: dict[str, list[float]] = {}
        for start in range(0, min(features.shape[1], _DETECTION_PIECES * FULL_FRAMES), FULL_FRAMES):
            piece = self._decoder.encode(features[:, start : start + FULL_FRAMES])
            language = self._decoder.detect_language(piece)
            if language.probability < DOUBTFUL_BELOW and piece.frames < FULL_FRAMES:
                piece = self._decoder.encode(piece.features, frames=FULL_FRAMES)
                language = self._decoder.detect_language(piece)
            if start == 0 and piece.features.shape == first.next_features.shape:
                first.first = replace(piece, language=language)
            if language.probability > CERTAIN_ABOVE:
                return language
            votes.setdefault(language.code, []).append(language.probability)
        code = max(votes, key=lambda code: len(votes[code]))
        return Language(code, max(votes[code]))

    def _detect_languages(self, ranges: Sequence[Range]) -> list[_Speech]:
        """Detect the language of each utterance; those in one language that follow without a pause are one range."""
        utterances = self._cut(ranges, _UTTERANCE, search_window=_UTTERANCE)
        detected = [
            self._decoder.detect_language(self._decoder.encode(self._compute([one]).features)) for one in utterances
        ]
        certain = [language for language in detected if language.probability > CERTAIN_ABOVE]
        if utterances and self.language is None:
            spoken: dict[str, int] = {}
            for (start, end), language in zip(utterances, detected, strict=True):
                if not certain or language in certain:
                    spoken[language.code] = spoken.get(language.code, 0) + end - start
            most = max(spoken, key=lambda code: spoken[code])
            self.language = Language(most, max(one.probability for one in detected if one.code == most))
        current = certain[0].code if certain else "" if self.language is None else self.language.code
        codes: list[str] = []
        for language in detected:
            current = language.code if language.probability > CERTAIN_ABOVE or not current else current
            codes.append(current)
        return [
            self._compute(group, code)
            for code, same in groupby(zip(codes, utterances, strict=True), key=lambda pair: pair[0])
            for group in self._join([utterance for _, utterance in same])
        ]

    def _compute(self, ranges: Sequence[Range], language: str | None = None) -> _Speech:
        timeline = Timeline(ranges)
        samples = timeline.join(self._samples)
        return _Speech(timeline, log_mel(self._extractor, samples, self._should_stop), language)

    def _join(self, ranges: Sequence[Range]) -> list[list[Range]]:
        # What is decoded in batches is cut to pieces before; otherwise each piece goes on where the one before ended.
        most = FULL_FRAMES * HOP_SAMPLES if self._batch_size > 1 else math.inf
        return join_near(ranges, gap=_JOINED_GAP, most=most)

    def _cut(self, ranges: Sequence[Range], limit: int, *, search_window: int | None = None) -> list[Range]:
        """Cut ranges that are longer than the limit at their pauses."""
        return [
            (start + first, start + after)
            for start, end in ranges
            for first, after in split(self._samples[start:end], limit, search_window=search_window)
        ]


def _segment(
    segment: Mapping[str, Any],
    words: Sequence[Mapping[str, Any]] | None,
    result: Result,
    timeline: Timeline,
    number: int,
) -> RawSegment:
    """Convert a segment that lies in one range."""
    return RawSegment(
        start=timeline.in_chunk(segment["start"], number),
        end=timeline.in_chunk(segment["end"], number),
        text=segment["text"],
        avg_logprob=result.avg_logprob,
        no_speech_prob=result.no_speech_prob,
        words=None if words is None else [_word(word, timeline, number) for word in words],
    )


def _cut_apart(
    segment: Mapping[str, Any],
    words: Sequence[Mapping[str, Any]],
    result: Result,
    timeline: Timeline,
    *,
    keep_words: bool,
) -> list[RawSegment]:
    """Cut a segment that reaches into several ranges, at its words."""
    found = []
    for number, group in groupby(words, key=lambda word: timeline.range_at((word["start"] + word["end"]) / 2)):
        spoken = list(group)
        part = {
            "start": spoken[0]["start"],
            "end": spoken[-1]["end"],
            "text": "".join(word["word"] for word in spoken),
        }
        found.append(_segment({**segment, **part}, spoken if keep_words else None, result, timeline, number))
    return found


def _word(word: Mapping[str, Any], timeline: Timeline, number: int) -> RawWord:
    return RawWord(
        start=timeline.in_chunk(word["start"], number),
        end=timeline.in_chunk(word["end"], number),
        word=word["word"],
        probability=word["probability"],
    )
