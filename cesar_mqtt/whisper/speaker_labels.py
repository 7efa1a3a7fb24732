"""From turns of speakers to segments that have one speaker each. Pure; any thread may use it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from cesar_mqtt.transcript import Segment, Window, Word


@dataclass(frozen=True, slots=True)
class SpokenTurn:
    """A speaker, by the name that is published, speaks from second to second of the file."""

    start_s: float
    end_s: float
    speaker: str


def label_windows(windows: Iterable[Window], turns: Sequence[SpokenTurn]) -> tuple[Window, ...]:
    """Give each segment its speaker, and split those in which the speaker changes; the ids count anew.

    Args:
        windows: of a whole file, their segments with words.
        turns: in order of their start; those of different speakers may overlap. Without any, no segment gets a speaker.
    """
    ids = count(1)
    timeline = _Timeline(turns)
    return tuple(
        replace(
            window,
            segments=tuple(
                replace(part, id=next(ids)) for segment in window.segments for part in _parts(segment, timeline)
            ),
        )
        for window in windows
    )


class _Timeline:
    """The turns, read from start to end; a later question may begin a little earlier, as segments may overlap."""

    def __init__(self, turns: Sequence[SpokenTurn]) -> None:
        self._turns = turns
        self._first = 0
        self._longest_s = max((turn.end_s - turn.start_s for turn in turns), default=0.0)

    def speaker(self, start_s: float, end_s: float, before: str | None) -> str | None:
        """Return who speaks most between two times; of equals the one `before`, of silence the nearest.

        Args:
            start_s: not much earlier than in the call before.
            end_s: not before `start_s`.
            before: who spoke the word before; None: it is the first of its segment.
        """
        near = self._near(start_s, end_s)
        overlaps: dict[str, float] = {}
        for turn in near:
            overlap_s = min(end_s, turn.end_s) - max(start_s, turn.start_s)
            if overlap_s > 0:
                overlaps[turn.speaker] = overlaps.get(turn.speaker, 0.0) + overlap_s
        if overlaps:
            return max(overlaps, key=lambda name: (round(overlaps[name], 3), name == before))
        if before is not None:
            return before
        distances = [(max(turn.start_s - end_s, start_s - turn.end_s), turn.speaker) for turn in near]
        return min(distances, key=lambda found: found[0])[1] if distances else None

    def _near(self, start_s: float, end_s: float) -> list[SpokenTurn]:
        """Return the turns that overlap a time, or its neighbours on either side where there is none."""
        turns = self._turns
        while self._first < len(turns) and turns[self._first].start_s < start_s - self._longest_s:
            self._first += 1
        while self._first > 0 and turns[self._first - 1].start_s >= start_s - self._longest_s:
            self._first -= 1
        found = turns[max(0, self._first - 1) : self._first]
        near = list(found)
        for turn in turns[self._first :]:
            near.append(turn)
            if turn.start_s >= end_s:
                break
        return near


def _parts(segment: Segment, timeline: _Timeline) -> Iterator[Segment]:
    words = segment.words or ()
    if "".join(word.text for word in words).strip() != segment.text:
        # Without words, or with others than the text has, it cannot be split.
        yield replace(segment, speaker=timeline.speaker(segment.start_s, segment.end_s, None))
        return
    groups: list[tuple[str | None, list[Word]]] = []
    for word in words:
        speaker = timeline.speaker(word.start_s, word.end_s, groups[-1][0] if groups else None)
        if groups and groups[-1][0] == speaker:
            groups[-1][1].append(word)
        else:
            groups.append((speaker, [word]))
    for number, (speaker, spoken) in enumerate(groups):
        start_s = segment.start_s if number == 0 else spoken[0].start_s
        end_s = segment.end_s if number == len(groups) - 1 else spoken[-1].end_s
        yield replace(
            segment,
            start_s=start_s,
            end_s=max(start_s, end_s),
            text="".join(word.text for word in spoken).strip(),
            words=tuple(spoken),
            speaker=speaker,
        )
