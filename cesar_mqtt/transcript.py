"""What a transcription is made of: frozen values that the transcriber makes, and ledger and formats read.

Times are seconds from the start of the file, whatever was cut out or left out on the way.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a segment, with the blank before it if there is one; `probability` from 0 to 1."""

    start_s: float
    end_s: float
    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech, 0 <= `start_s` <= `end_s` <= the file's duration.

    Attributes:
        id: counts from 1 through the whole file.
        text: without blanks around it.
        avg_logprob: mean log probability of the tokens, 0 at best; always a finite number.
        no_speech_prob: 0 to 1, the model's belief that nobody speaks in the 30 s around.
        words: None if they were not asked for.
    """

    id: int
    start_s: float
    end_s: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """A finished part of a file, from the end of the one before; what a checkpoint holds.

    Attributes:
        number: counts from 0.
        until_s: where it ends; the work goes on from there.
        text: its segments as the model gave them, blanks included, so that the texts of all windows can be joined.
        language: Whisper's code; None if nobody spoke in it.
        language_probability: None if nobody spoke in it.
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

    `audio_duration_s` is None as long as a file that does not declare it is not decoded to its end.
    """

    processed_s: float
    audio_duration_s: float | None


@dataclass(frozen=True, slots=True)
class Transcript:
    """The result.

    Attributes:
        text: all segments, without blanks around it; empty if nobody spoke.
        language: Whisper's code; None if nobody spoke.
        language_probability: 1.0 if the language was given, or is the model's only one; None if nobody spoke.
        no_speech: whether nobody spoke.
        audio_duration_s: seconds of audio that could be decoded.
        windows: the parts that it is made of, in order, with those that an earlier attempt had finished.
        warnings: `audio_truncated`, `audio_damaged`, `initial_prompt_truncated`, `hotwords_truncated`.
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
