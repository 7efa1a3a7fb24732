"""What a transcription is asked for and what it yields: frozen values that any thread may make and read.

Times are seconds from the start of the file, whatever the VAD or `clip_timestamps` left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAX_PROMPT_CHARACTERS = 10_000
"""Prompts and hotwords are cut to this length before tokenising: the 100 tokens that are kept never need more."""
_CUT_MARK = "…"
"""Stands where a text was cut: one character more than the pipeline reads, so that it reports the cut as a warning."""


@dataclass(frozen=True, slots=True)
class TranscriptionOptions:
    """The options of one job, already validated. Lists, as JSON has them, become tuples.

    Attributes:
        model_size: a name that the model store knows.
        language: Whisper's code; None: detected once for the whole file.
        task: `transcribe`, or `translate` into English.
        initial_prompt: text that leads the model to a spelling or style; its last 100 tokens count.
        hotwords: words to expect, given to the model with each 30 s; their first 100 tokens count.
        beam_size: how many hypotheses the decoder follows, 1 to 10; `auto`: one, and five where the result is unsure.
        temperature: 0 decodes greedily or by beam search, up to 1 samples more and more freely. Of several, each
            further one is tried where the result of the one before fails Whisper's checks. None: Whisper's own list.
        vad_filter: whether the VAD removes what is not speech first, so that silence yields no invented text.
        word_timestamps: whether segments have `words` in what is published.
        clip_timestamps: only these ranges of the file, as (start, end) in seconds; empty: the whole file.
        batch_size: how many pieces of up to 30 s are decoded at once.
        multilingual: whether the language may change within the file: it is detected for each passage.
        audio_track: the number of an audio track of the file, from 0; `mix`: all together; None: the default one.
        max_line_width: of the lines of subtitles, in columns, 10 to 1000.
        max_line_count: how many lines a cue of subtitles has at most, 1 to 10.
        diarize: whether the speakers are told apart; `channels`: by the channels of the recording.
        min_speakers: at least so many are told apart, 1 to 20; None: one.
        max_speakers: at most so many, 1 to 20; None: as many as there are.
    """

    model_size: str
    language: str | None = None
    task: str = "transcribe"
    initial_prompt: str | None = None
    beam_size: int | Literal["auto"] = "auto"
    vad_filter: bool = True
    hotwords: str | None = None
    temperature: float | Sequence[float] | None = None
    word_timestamps: bool = False
    clip_timestamps: Sequence[Sequence[float]] = ()
    batch_size: int = 1
    audio_track: int | Literal["mix"] | None = None
    multilingual: bool = False
    max_line_width: int = 42
    max_line_count: int = 2
    diarize: bool | Literal["channels"] = False
    min_speakers: int | None = None
    max_speakers: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            object.__setattr__(self, "temperature", self.temperatures or None)
        object.__setattr__(self, "clip_timestamps", self.clips)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """`temperature` as a tuple; empty: Whisper's own list."""
        several = self.temperature if isinstance(self.temperature, Sequence) else (self.temperature,)
        return tuple(float(one) for one in several if one is not None)

    @property
    def clips(self) -> tuple[tuple[float, float], ...]:
        """`clip_timestamps` as pairs of floats."""
        return tuple((float(start_s), float(end_s)) for start_s, end_s in self.clip_timestamps)


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a segment, with the blank before it if there is one; `probability` from 0 to 1."""

    start_s: float
    end_s: float
    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A passage of speech, 0 <= `start_s` <= `end_s` <= the duration of the file.

    Attributes:
        id: counts from 1 through the whole file.
        text: without blanks around it.
        avg_logprob: mean log probability of the tokens, 0 at best; always a finite number.
        no_speech_prob: 0 to 1, the model's belief that the 30 s around it hold no speech.
        words: None if they were not asked for.
        speaker: who speaks it and all its words, such as `Speaker 1`; None: the speakers were not told apart.
    """

    id: int
    start_s: float
    end_s: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None
    speaker: str | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """A finished part of a file, from the end of the one before; the content of a checkpoint.

    Attributes:
        number: counts from 0.
        until_s: where it ends, and where the next one begins.
        text: its segments as the model gave them, blanks included, so that the texts of all windows can be joined.
        language: Whisper's code; None if it holds no speech.
        language_probability: None if it holds no speech.
        segments: in order of time.
    """

    number: int
    until_s: float
    text: str
    language: str | None
    language_probability: float | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transcription is: `processed_s` never goes back and never passes `audio_duration_s`.

    `audio_duration_s` is None until a file that does not declare its duration has been decoded to its end.
    """

    processed_s: float
    audio_duration_s: float | None


@dataclass(frozen=True, slots=True)
class Transcript:
    """The result.

    Attributes:
        text: all segments, without blanks around it; empty if there was no speech.
        language: Whisper's code; None if there was no speech.
        language_probability: 1.0 if the language was given, or is the model's only one; None if there was no speech.
        no_speech: whether there was no speech at all.
        audio_duration_s: seconds of audio that could be decoded.
        windows: its parts in order, those of earlier attempts included.
        warnings: names that the contract lists.
    """

    text: str
    language: str | None
    language_probability: float | None
    no_speech: bool
    audio_duration_s: float
    windows: tuple[Window, ...]
    warnings: tuple[str, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in order of time."""
        return tuple(segment for window in self.windows for segment in window.segments)


def cut_prompt(text: str) -> str:
    """Cut a prompt to the part that can count, its end."""
    plain = _without_stripped_characters(text)
    return plain if len(plain) <= MAX_PROMPT_CHARACTERS else _CUT_MARK + plain[-MAX_PROMPT_CHARACTERS:]


def cut_hotwords(text: str) -> str:
    """Cut hotwords to the part that can count, their beginning."""
    plain = _without_stripped_characters(text)
    return plain if len(plain) <= MAX_PROMPT_CHARACTERS else plain[:MAX_PROMPT_CHARACTERS] + _CUT_MARK


def _without_stripped_characters(text: str) -> str:
    """Remove from a long text what the pipeline would remove (blanks around it, control tokens): it must stay long."""
    return text if len(text) <= MAX_PROMPT_CHARACTERS else text.replace("|", " ").strip()
