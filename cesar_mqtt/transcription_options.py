"""What a producer may choose about a transcription: one frozen value, which any thread may make and read."""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_CHARACTERS = 10_000
"""More of a text cannot become the tokens that count of it; the listener looks at no more."""
_CUT = "…"
"""Stands where a text was cut. It makes the text longer than what is looked at, so that the listener sees the cut."""


@dataclass(frozen=True, slots=True)
class TranscriptionOptions:
    """The contract's fields of a job, checked before; lists, as JSON has them, become tuples.

    Attributes:
        model_size: a name that the model store knows.
        language: Whisper's code of the language; None: detected, once for the whole file.
        task: `transcribe`, or `translate` into English.
        initial_prompt: words that lead the model to a spelling or style; its last 100 tokens count.
        hotwords: words to listen for, which lead it in each 30 s; their first 100 tokens count.
        beam_size: how many hypotheses are followed, 1 to 10.
        temperature: 0 takes the likeliest words, and up to 1 more and more chance comes in; of several, each further
            one is for what was not heard well with the one before. None: Whisper's own list. Batched, only the first
            counts.
        vad_filter: whether what is not speech is cut out first, so that nothing is made up for silence.
        word_timestamps: whether segments have `words`.
        clip_timestamps: only these ranges of the file, as (start, end) in seconds; empty: all of it.
        batch_size: with more than 1, so many stretches of up to 30 s are worked on at once, which is faster, and a
            little worse: what was not heard well is not tried again.
    """

    model_size: str
    language: str | None = None
    task: str = "transcribe"
    initial_prompt: str | None = None
    beam_size: int = 5
    vad_filter: bool = True
    hotwords: str | None = None
    temperature: float | Sequence[float] | None = None
    word_timestamps: bool = False
    clip_timestamps: Sequence[Sequence[float]] = ()
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.temperature is not None:
            several = self.temperature if isinstance(self.temperature, Sequence) else (self.temperature,)
            object.__setattr__(self, "temperature", tuple(float(one) for one in several) or None)
        object.__setattr__(self, "clip_timestamps", self.clips)

    @property
    def clips(self) -> tuple[tuple[float, float], ...]:
        """The ranges of `clip_timestamps` as pairs."""
        return tuple((float(start_s), float(end_s)) for start_s, end_s in self.clip_timestamps)


def kept_of_prompt(text: str) -> str:
    """Return what can count of a prompt, which is its end."""
    plain = _plain(text)
    return plain if len(plain) <= MOST_CHARACTERS else _CUT + plain[-MOST_CHARACTERS:]


def kept_of_hotwords(text: str) -> str:
    """Return what can count of hotwords, which is their beginning."""
    plain = _plain(text)
    return plain if len(plain) <= MOST_CHARACTERS else plain[:MOST_CHARACTERS] + _CUT


def _plain(text: str) -> str:
    """Return a text; a long one so that the listener, who takes blanks and control tokens out, will find none."""
    return text if len(text) <= MOST_CHARACTERS else text.replace("|", " ").strip()
