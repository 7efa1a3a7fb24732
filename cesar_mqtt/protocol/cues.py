"""From segments to the cues of subtitles: short enough to be read, cut where a reader expects it. Pure; any thread.

A cue lasts at most 7 s, has at most as many lines as asked for, and overlaps no other. Times are whole milliseconds,
each rounded once. Words without times are taken to last as long as they are wide.
"""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from cesar_mqtt.transcript import Segment

_MOST_MS = 7000
_LONGEST_PAUSE_MS = 1500
"""A cue does not span a longer pause between two words."""

# A cue that is too short to be read stays a little longer, until the next one begins.
_READABLE_MS, _MS_PER_COLUMN = 1000, 50
_LONGEST_EXTENSION_MS = 500
_LEAST_MS = 500
"""After so long the next cue replaces one that still lasts; before, it waits."""

# What a cut costs: many cues are worse than few, and a cut after a stop or in a pause is better than another.
_CUE_COST, _CUT_COST, _SHORT_COST, _FULL_COST = 40.0, 30.0, 30.0, 20.0
"""The last grows with the square of the text, so that cues are about as long as each other."""
_STOPS = ((frozenset(".!?…。！？।؟"), 0.0), (frozenset(",;:–—，、；：،"), 12.0))  # noqa: RUF001 - of other scripts
_PAUSE_MS, _PAUSE_DISCOUNT = 300, 12.0

# Of scripts that write no blanks between words, each character may begin a line, except these.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Japanese
    (0x3400, 0x9FFF),  # Chinese
    (0x20000, 0x3FFFF),
)
_MARKS = frozenset({"Mn", "Mc", "Me"})
_CLOSING = _MARKS | {"Pe", "Pf", "Pd", "Po", "Lm"}
_OPENING = frozenset({"Ps", "Pi"})
_NOT_LAST = frozenset("เแโใไເແໂໃໄ")
_NOT_FIRST = frozenset("\u0e30\u0e32\u0e33\u0eb0\u0eb2\u0eb3ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ")


@dataclass(frozen=True, slots=True)
class Cue:
    """Lines of text, at least one and none of them empty; shown from `start_ms` to `end_ms`, which is later."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    speaker: str | None = None


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is not cut: a word with its punctuation, or some characters of a script without blanks."""

    text: str
    start_ms: float
    end_ms: float
    spaced: bool
    """Whether a blank stands before it."""
    width: int
    """In columns."""


def cues_of(segments: Iterable[tuple[Segment, str]], *, max_line_width: int, max_line_count: int) -> list[Cue]:
    """Return the cues of a transcript.

    Args:
        segments: in order of time, each with its text on one line, which is not empty.
        max_line_width: in columns, at least 2; a wide character, such as a Chinese one, takes two.
        max_line_count: how many lines a cue may have.
    """
    cues = []
    for segment, line in segments:
        for part in _cut(_units(segment, line, max_line_width), max_line_width, max_line_count):
            start_ms = round(part[0].start_ms)
            shown_ms = min(_shown_ms(part), _MOST_MS)
            cues.append(Cue(start_ms, start_ms + shown_ms, _balanced_lines(part, max_line_width), segment.speaker))
    return _without_overlaps(cues)


def _shown_ms(part: Sequence[_Unit]) -> int:
    """Return how long a cue is shown: as long as it is spoken, or a little longer so that it can be read."""
    spoken_ms = max(0, round(part[-1].end_ms) - round(part[0].start_ms))
    readable_ms = max(_READABLE_MS, sum(unit.width + unit.spaced for unit in part) * _MS_PER_COLUMN)
    return max(spoken_ms, min(readable_ms, spoken_ms + _LONGEST_EXTENSION_MS))


def _without_overlaps(cues: Iterable[Cue]) -> list[Cue]:
    placed: list[Cue] = []
    for cue in cues:
        start_ms = cue.start_ms
        if placed:
            last = placed[-1]
            start_ms = max(start_ms, min(last.end_ms, last.start_ms + _LEAST_MS))
            placed[-1] = replace(last, end_ms=min(last.end_ms, start_ms))
        late_ms = start_ms - cue.start_ms
        end_ms = max(cue.end_ms, min(start_ms + _LEAST_MS, cue.end_ms + late_ms))
        placed.append(replace(cue, start_ms=start_ms, end_ms=min(end_ms, start_ms + _MOST_MS)))
    return placed


# -- from a segment to what is not cut ---------------------------------------------------------------------------------


def _units(segment: Segment, line: str, max_width: int) -> list[_Unit]:
    units: list[_Unit] = []
    for token in _timed_words(segment, line) or _estimated_words(segment, line):
        if units and not token.spaced and not _may_part(units[-1].text, token.text):
            last = units.pop()
            text, width = last.text + token.text, last.width + token.width
            units.append(replace(last, text=text, width=width, end_ms=token.end_ms))
        else:
            units.append(token)
    return [piece for unit in units for piece in _pieces(unit, max_width)]


def _timed_words(segment: Segment, line: str) -> list[_Unit]:
    """Return the words of a segment; none: it has none, or others than its text."""
    words = segment.words or ()
    if "".join("".join(word.text for word in words).split()) != "".join(line.split()):
        return []
    units, spaced = [], False
    at_ms, last_ms = segment.start_s * 1000, max(segment.start_s, segment.end_s) * 1000
    for word in words:
        text = word.text.strip()
        spaced |= word.text[:1].isspace()
        if text:
            start_ms = min(max(at_ms, word.start_s * 1000), last_ms)
            at_ms = min(max(start_ms, word.end_s * 1000), last_ms)
            units.append(_Unit(text, start_ms, at_ms, spaced, _width(text)))
            spaced = False
        spaced |= word.text[-1:].isspace()
    return units


def _estimated_words(segment: Segment, line: str) -> Iterator[_Unit]:
    start_ms = segment.start_s * 1000
    per_column_ms = max(0.0, segment.end_s * 1000 - start_ms) / (_width(line) or 1)
    column = 0
    for word in line.split():
        for number, text in enumerate(_characters(word)):
            spaced = number == 0 and column > 0
            column += spaced
            width = _width(text)
            yield _Unit(
                text, start_ms + column * per_column_ms, start_ms + (column + width) * per_column_ms, spaced, width
            )
            column += width


def _characters(word: str) -> Iterator[str]:
    """Yield a word as it is, or the characters of a script without blanks one by one."""
    if word.isascii():
        yield word
        return
    begin = 0
    for end, (before, after) in enumerate(pairwise(word), start=1):
        if _may_part(before, after):
            yield word[begin:end]
            begin = end
    yield word[begin:]


def _may_part(before: str, after: str) -> bool:
    """Whether a line may end between two texts without a blank between them."""
    last, first = before[-1], after[0]
    if not (_is_unspaced(last) or _is_unspaced(first)) or first in _NOT_FIRST or last in _NOT_LAST:
        return False
    return unicodedata.category(first) not in _CLOSING and unicodedata.category(last) not in _OPENING


def _is_unspaced(character: str) -> bool:
    return character > "\u0dff" and any(low <= ord(character) <= high for low, high in _UNSPACED)


def _pieces(unit: _Unit, max_width: int) -> Iterator[_Unit]:
    """Yield a unit, in pieces if it is wider than a line."""
    if unit.width <= max_width:
        yield unit
        return
    begin, column = 0, 0
    per_column_ms = (unit.end_ms - unit.start_ms) / unit.width
    while begin < len(unit.text):
        widths = accumulate(_width(character) for character in unit.text[begin : begin + max_width])
        end = begin + max(1, sum(width <= max_width for width in widths))
        while end < len(unit.text) and end > begin + 1 and unicodedata.category(unit.text[end]) in _MARKS:
            end -= 1
        text = unit.text[begin:end]
        width, start_ms = _width(text), unit.start_ms + column * per_column_ms
        yield _Unit(text, start_ms, start_ms + width * per_column_ms, unit.spaced and begin == 0, width)
        begin, column = end, column + width


def _width(text: str) -> int:
    return len(text) if text.isascii() else sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


# -- from a segment to cues --------------------------------------------------------------------------------------------


def _cut(units: Sequence[_Unit], max_width: int, max_lines: int) -> list[Sequence[_Unit]]:
    """Cut a segment into cues at the least cost (`_CUE_COST` and others)."""
    costs = [0.0] + [math.inf] * len(units)
    begins = [0] * len(costs)
    for begin in range(len(units)):
        for end in _possible_ends(units, begin, max_width, max_lines):
            share = sum(unit.width for unit in units[begin:end]) / (max_width * max_lines)
            cost = costs[begin] + _cost(units, begin, end) + _FULL_COST * share**2
            if cost < costs[end]:
                costs[end], begins[end] = cost, begin
    parts, end = [], len(units)
    while end:
        parts.append(units[begins[end] : end])
        end = begins[end]
    return parts[::-1]


def _possible_ends(units: Sequence[_Unit], begin: int, max_width: int, max_lines: int) -> Iterator[int]:
    """Yield where a cue may end that begins with this unit; one unit is always possible."""
    lines, width = 1, units[begin].width
    yield begin + 1
    for number in range(begin + 1, len(units)):
        unit = units[number]
        if unit.start_ms - units[number - 1].end_ms > _LONGEST_PAUSE_MS:
            return
        if round(unit.end_ms) - round(units[begin].start_ms) > _MOST_MS:
            return
        if width + unit.spaced + unit.width <= max_width:
            width += unit.spaced + unit.width
        else:
            lines, width = lines + 1, unit.width
        if lines > max_lines:
            return
        yield number + 1


def _cost(units: Sequence[_Unit], begin: int, end: int) -> float:
    """Return what a cue of these units costs, with the cut at its end."""
    cost = _CUE_COST
    if end - begin < len(units) and units[end - 1].end_ms - units[begin].start_ms < _READABLE_MS:
        cost += _SHORT_COST
    if end == len(units):
        return cost
    last = units[end - 1].text.rstrip("\"'”’»)]」』")  # noqa: RUF001 - quotation marks
    cut_cost = next((stop_cost for stops, stop_cost in _STOPS if last[-1:] in stops), _CUT_COST)
    pauses = units[end].start_ms - units[end - 1].end_ms >= _PAUSE_MS
    return cost + (max(0.0, cut_cost - _PAUSE_DISCOUNT) if pauses else cut_cost)


def _balanced_lines(units: Sequence[_Unit], max_width: int) -> tuple[str, ...]:
    """Return the fewest lines that hold the units, as even as possible."""
    lines = _lines(units, max_width)
    least, most = 1, max_width
    while len(lines) > 1 and least < most:
        width = (least + most) // 2
        narrower = _lines(units, width)
        if len(narrower) > len(lines) or any(_width(line) > width for line in narrower):
            least = width + 1
        else:
            lines, most = narrower, width
    return tuple(lines)


def _lines(units: Sequence[_Unit], max_width: int) -> list[str]:
    lines, width = [units[0].text], units[0].width
    for unit in units[1:]:
        if width + unit.spaced + unit.width <= max_width:
            lines[-1] += " " * unit.spaced + unit.text
            width += unit.spaced + unit.width
        else:
            lines.append(unit.text)
            width = unit.width
    return lines
