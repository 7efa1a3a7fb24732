"""What a benchmark found, and how it is printed: one line a row, with its bound and whether it was kept."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: what was measured.
        value: the figure that is judged.
        unit: what it counts.
        at_least: the bound below, if it has one.
        at_most: the bound above, if it has one.
        beside: the figures that it was made of.
    """

    what: str
    value: float
    unit: str = "ratio"
    at_least: float | None = None
    at_most: float | None = None
    beside: str = ""

    @property
    def kept(self) -> bool | None:
        """Whether the bound was kept; None: there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        if self.at_most is not None:
            return self.value <= self.at_most
        return None


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def show(rows: Sequence[Row]) -> None:
    bounds = {True: "kept", False: "MISSED", None: ""}
    print(f"{'what':<66} {'measured':>12} {'bound':>9}  ")
    for row in rows:
        bound = f">= {row.at_least:g}" if row.at_least is not None else ""
        bound = f"<= {row.at_most:g}" if row.at_most is not None else bound
        unit = "" if row.unit == "ratio" else f" {row.unit}"
        print(f"{row.what:<66} {f'{row.value:.3g}{unit}':>12} {bound:>9}  {bounds[row.kept]:<7}{row.beside}")
