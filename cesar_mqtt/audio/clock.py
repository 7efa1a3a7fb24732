"""The file's clock: where on it a frame belongs, and which jumps of the time stamps are real.

Pure; for the thread that decodes.
"""

from dataclasses import dataclass, field

JITTER_S = 0.1
"""Time stamps that are rounded or wander by less are no gap."""
_OVERLAP_S = 1.0
"""A frame may begin so much before the end of the one before (a recorder whose clock is slow); more is a new clock."""
_UNDECLARED_GAP_S = 600.0
"""The longest gap that is believed without a witness: longer ones are mostly a new clock, of another file that was
joined to this one or of a recorder that was started again."""
_DECLARED_TOLERANCE = 1.02


@dataclass(slots=True)
class Witnesses:
    """The seconds in which the other tracks of the file have packets, since the last packet of the chosen one."""

    _seconds: set[int] = field(default_factory=set)

    def note(self, time_s: float) -> None:
        self._seconds.add(int(time_s))

    def forget(self) -> None:
        if self._seconds:
            self._seconds.clear()

    def confirm(self, start_s: float, end_s: float) -> bool:
        """Whether the other tracks go on through most of a gap."""
        inside = sum(start_s < second < end_s for second in self._seconds)
        return inside > (end_s - start_s) / 2


@dataclass(slots=True)
class Clock:
    """Turns the time stamps of one track into silence between its frames.

    Attributes:
        zero_s: the time stamp at which the file begins.
        declared_s: where the file says that it ends; None: it does not say, or cannot know.
        max_s: the limit on the duration.
        witnesses: of the other tracks.
        jumped: whether a new clock was started in the middle.
        left_out_gap: whether one of those jumps may have been a long gap.
    """

    zero_s: float
    declared_s: float | None
    max_s: float
    witnesses: Witnesses
    jumped: bool = False
    left_out_gap: bool = False
    _shift_s: float = 0.0

    def gap_s(self, stamp_s: float, heard_s: float) -> float:
        """Return how much silence lies between the sound so far, which ends at `heard_s`, and a frame's time stamp.

        A jump back, and a jump forward that cannot be real, start a new clock: the frame follows at once.
        """
        ahead_s = stamp_s - self.zero_s + self._shift_s - heard_s
        if -_OVERLAP_S <= ahead_s <= JITTER_S:
            return 0.0
        if ahead_s > 0 and self._is_real(heard_s, ahead_s, stamp_s - heard_s - ahead_s):
            return ahead_s
        self._shift_s -= ahead_s
        self.jumped = self.jumped or heard_s > 0
        self.left_out_gap = self.left_out_gap or (self.declared_s is None and ahead_s > _UNDECLARED_GAP_S)
        return 0.0

    def _is_real(self, heard_s: float, gap_s: float, to_stamps_s: float) -> bool:
        until_s = heard_s + gap_s
        if self.declared_s is not None and heard_s <= self.declared_s:
            return until_s <= self.declared_s * _DECLARED_TOLERANCE + 1.0
        if until_s > self.max_s:
            return False
        return gap_s <= _UNDECLARED_GAP_S or self.witnesses.confirm(heard_s + to_stamps_s, until_s + to_stamps_s)
