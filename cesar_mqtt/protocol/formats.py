"""Transcripts as files: plain text, subtitles, a table, JSON, Markdown. Pure; any thread may call it.

Every file is UTF-8 and ends with a line break. None is empty, even without speech: an empty retained payload would
clear the topic of the result.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from cesar_mqtt.jobs import Job
from cesar_mqtt.protocol.cues import Cue, cues_of
from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.languages import language_name
from cesar_mqtt.protocol.payloads import audio_source_of, public_source, segment_fields
from cesar_mqtt.protocol.truncate import most_that_fit
from cesar_mqtt.transcript import Segment

_HOUR_MS = 3_600_000
_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
"""What some program reads as the end of a line, of a column or of the file."""
_MARKDOWN = re.compile(r"[\\`*_\[\]<>#|~&]|^[-+=](?=\s|$)|^:?-{2}")
"""What Markdown reads as more than a character (CommonMark, section 2.4)."""
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")
_SENTENCE_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f", "\u0964", "\u061f", '"', "\u201d")
_PARAGRAPH_S, _PAUSE_S = 60.0, 2.0
"""A paragraph of Markdown ends after so long, or at a pause of so long."""
_ARROW = re.compile("-{2,}>")
_VTT_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})  # https://www.w3.org/TR/webvtt1/, section 4.2.2


@dataclass(frozen=True, slots=True)
class Content:
    """The transcript that a file holds.

    Attributes:
        text: the whole transcript: the texts of the segments one after the other.
        segments: in order of time.
        language: Whisper's code; None without speech.
        language_probability: 0 to 1; None without speech.
        duration_s: of the audio; None if it is not known.
        task: `transcribe` or `translate`.
        has_words: whether JSON holds the words of the segments.
        max_line_width: of subtitles, in columns.
        max_line_count: of a cue.
        title: of the transcript, on one line.
        source: which recording it is of; None: it came with the request.
        model: the one that heard it.
    """

    text: str
    segments: Sequence[Segment]
    language: str | None
    language_probability: float | None
    duration_s: float | None
    task: str
    has_words: bool = True
    max_line_width: int = 42
    max_line_count: int = 2
    title: str = "Transcript"
    source: str | None = None
    model: str | None = None


def content_of(job: Job, segments: Sequence[Segment]) -> Content:
    """Return what the files of a completed job hold."""
    return Content(
        text=job.result_text or "",
        segments=segments,
        language=job.detected_language,
        language_probability=job.language_probability,
        duration_s=job.audio_duration,
        task=job.options.get("task", "transcribe"),
        has_words=job.options.get("word_timestamps", False),
        max_line_width=job.options.get("max_line_width", 42),
        max_line_count=job.options.get("max_line_count", 2),
        title=_title_of(job),
        source=audio_source_of(job),
        model=job.model_size,
    )


def _title_of(job: Job) -> str:
    """Return the name of the file, as far as it is known, or the id."""
    file = job.metadata.get("file")
    if isinstance(file, str) and file.strip():
        return file
    if job.audio is None or job.audio.kind not in {"path", "url"}:
        return job.job_id
    return public_source(job.audio).rstrip("/").rpartition("/")[2] or job.job_id


def render(name: str, content: Content, *, limit_bytes: int | None = None) -> tuple[bytes, bool]:
    """Write a transcript as a file.

    Args:
        name: one of `FORMATS`.
        content: what to write.
        limit_bytes: the largest file; None: no limit.

    Returns:
        The file, and whether it was cut. A cut one holds as many of the first segments (of subtitles: cues) as fit,
        each of them whole, and is still a file of its format; JSON is marked by `truncated`. A limit below what a file
        without segments takes (JSON: some 150 bytes, the others: 15 at most) is not kept.

    Raises:
        ValueError: there is no such format.
    """
    if name not in _WRITERS:
        raise ValueError(f"There is no format {name!r}; there are {', '.join(FORMATS)}.")
    parts = _WRITERS[name](content)
    whole = parts.joined(len(parts.pieces))
    if limit_bytes is None or len(whole) <= limit_bytes or not parts.pieces:
        return whole, False
    return parts.joined(most_that_fit(len(parts.pieces) - 1, limit_bytes, parts.size_bytes)), True


class _Parts:
    """A file in pieces. The first few of them, with a head and a tail, are a file as well."""

    def __init__(self, pieces: list[bytes], around: Callable[[int], tuple[bytes, bytes]]) -> None:
        """Take the pieces, and a function that returns the head and the tail of the first so many of them."""
        self.pieces = pieces
        self._around = around
        self._sizes = list(accumulate(map(len, pieces), initial=0))

    def size_bytes(self, count: int) -> int:
        head, tail = self._around(count)
        return len(head) + self._sizes[count] + len(tail)

    def joined(self, count: int) -> bytes:
        head, tail = self._around(count)
        return b"".join([head, *self.pieces[:count], tail])


def _txt(content: Content) -> _Parts:
    """Write a line for each segment, as Whisper does; without segments one line, which is cut between words."""
    lines = [_encoded(f"{_named(segment.speaker)}{line}\n") for segment, line in _spoken(content)]
    if lines:
        return _Parts(lines, _or_an_empty_line)
    words = _on_one_line(content.text).split()
    return _Parts([_encoded(f" {word}" if n else word) for n, word in enumerate(words)], lambda _: (b"", b"\n"))


def _srt(content: Content) -> _Parts:
    # SubRip knows no escapes, and lenient readers look for the arrow in every line.
    cues = (
        f"{number}\n{_timing(cue, decimal_mark=',')}\n{_ARROW.sub('->', _named(cue.speaker) + _lines(cue))}\n\n"
        for number, cue in enumerate(_cues(content), start=1)
    )
    return _Parts([_encoded(cue) for cue in cues], _or_an_empty_line)


def _vtt(content: Content) -> _Parts:
    cues = (f"{_timing(cue, decimal_mark='.')}\n{_voice(cue)}\n\n" for cue in _cues(content))
    return _Parts([_encoded(cue) for cue in cues], lambda _: (b"WEBVTT\n\n", b""))


def _voice(cue: Cue) -> str:
    """Return the text of a cue in the voice of its speaker, https://www.w3.org/TR/webvtt1/, section 4.2.2."""
    text = _lines(cue).translate(_VTT_ESCAPES)
    return text if cue.speaker is None else f"<v {_on_one_line(cue.speaker).translate(_VTT_ESCAPES)}>{text}"


def _tsv(content: Content) -> _Parts:
    rows = (f"{_ms(segment.start_s)}\t{_ms(segment.end_s)}\t{line}\n" for segment, line in _spoken(content))
    return _Parts([_encoded(row) for row in rows], lambda _: (b"start\tend\ttext\n", b""))


def _json(content: Content) -> _Parts:
    segments = content.segments if content.has_words else [replace(each, words=None) for each in content.segments]
    pieces = [_encoded((", " if n else "") + _dumps(segment_fields(each))) for n, each in enumerate(segments)]
    ends = _ends(content)

    def around(count: int) -> tuple[bytes, bytes]:
        cut = count < len(pieces)
        fields = {
            "text": content.text[: ends[count]] if cut else content.text,
            "language": content.language,
            "language_probability": content.language_probability,
            "duration": content.duration_s,
            "task": content.task,
            "truncated": cut,
        }
        return _encoded(_dumps(fields)[:-1] + ', "segments": ['), b"]}\n"

    return _Parts(pieces, around)


def _md(content: Content) -> _Parts:
    """Write a title, the facts, and paragraphs, each headed by its speaker and the time at which it begins."""
    facts = {
        "Recording": content.source,
        "Duration": None if content.duration_s is None else _hours(content.duration_s),
        "Language": _language(content),
        "Model": content.model,
    }
    listed = "".join(f"- {name}: {_escaped(_on_one_line(fact))}\n" for name, fact in facts.items() if fact)
    head = _encoded(f"# {_escaped(_on_one_line(content.title))}\n\n{listed}")
    pieces = [_encoded(f"{before}{_escaped(line)}") for before, line in _paragraphs(content)]
    if not pieces:
        words = _escaped(_on_one_line(content.text)).split()
        pieces = [_encoded(f" {word}" if number else f"\n{word}") for number, word in enumerate(words)]
    return _Parts(pieces, lambda count: (head, b"\n" if count else b""))


def _paragraphs(content: Content) -> Iterator[tuple[str, str]]:
    """Yield what comes before the text of each segment, and the text.

    A paragraph ends at a pause, at the end of a sentence after a minute, or where the speaker changes.
    """
    begin_s = end_s = 0.0
    text, speaker = "", None
    for segment, line in _spoken(content):
        is_long = end_s - begin_s >= _PARAGRAPH_S and text.endswith(_SENTENCE_ENDS)
        goes_on = segment.speaker == speaker and segment.start_s - end_s < _PAUSE_S
        if text and not is_long and goes_on:
            yield " ", line
        else:
            begin_s = segment.start_s
            heading = _hours(begin_s)
            if segment.speaker is not None:
                heading = f"{_escaped(_on_one_line(segment.speaker))}, {heading}"
            yield f"{chr(10) * (2 if text else 1)}## {heading}\n\n", line
        end_s, text, speaker = segment.end_s, line, segment.speaker


def _language(content: Content) -> str | None:
    if content.language is None:
        return None
    name = language_name(content.language)
    return f"{name}, translated into English" if content.task == "translate" else name


def _escaped(text: str) -> str:
    return _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(lambda found: "\\" + found.group(), text))


def _hours(seconds: float) -> str:
    return _clock(_ms(seconds), ".").partition(".")[0]


_WRITERS: Mapping[str, Callable[[Content], _Parts]] = {
    "txt": _txt,
    "srt": _srt,
    "vtt": _vtt,
    "tsv": _tsv,
    "json": _json,
    "md": _md,
}


def _spoken(content: Content) -> Iterator[tuple[Segment, str]]:
    """Yield the segments that have a text, each with its text on one line."""
    for segment in content.segments:
        line = _on_one_line(segment.text)
        if line:
            yield segment, line


def _named(speaker: str | None) -> str:
    return "" if speaker is None else f"{_on_one_line(speaker)}: "


def _on_one_line(text: str) -> str:
    return " ".join(part.strip() for part in _BREAKS.split(text)).strip()


def _or_an_empty_line(count: int) -> tuple[bytes, bytes]:
    return b"", b"" if count else b"\n"


def _cues(content: Content) -> list[Cue]:
    return cues_of(_spoken(content), max_line_width=content.max_line_width, max_line_count=content.max_line_count)


def _lines(cue: Cue) -> str:
    return "\n".join(cue.lines)


def _timing(cue: Cue, *, decimal_mark: str) -> str:
    return f"{_clock(cue.start_ms, decimal_mark)} --> {_clock(cue.end_ms, decimal_mark)}"


def _clock(time_ms: int, decimal_mark: str) -> str:
    hours, rest_ms = divmod(time_ms, _HOUR_MS)
    minutes, rest_ms = divmod(rest_ms, 60_000)
    seconds, rest_ms = divmod(rest_ms, 1000)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{decimal_mark}{rest_ms:03d}"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _ends(content: Content) -> list[int]:
    """Return where in the text the first 0, 1, 2, ... segments end."""
    ends = [0]
    for segment in content.segments:
        begin = content.text.find(segment.text, ends[-1])
        ends.append(ends[-1] if begin < 0 else begin + len(segment.text))
    return ends


def _encoded(text: str) -> bytes:
    """Return UTF-8; half a surrogate pair, which it has no bytes for, becomes a question mark."""
    return text.encode(errors="replace")


_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
