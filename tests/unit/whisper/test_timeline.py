from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.audio.decoder import SAMPLE_RATE
from cesar_mqtt.audio.vad import Range
from cesar_mqtt.whisper.timeline import Timeline, join_near

lengths = st.lists(st.tuples(st.integers(0, 80_000), st.integers(160, 80_000)), min_size=1, max_size=8)


def ranges_of(gaps_and_lengths: list[tuple[int, int]]) -> list[Range]:
    found, position = [], 0
    for gap, length in gaps_and_lengths:
        found.append((position + gap, position + gap + length))
        position += gap + length
    return found


@given(lengths, st.floats(-1, 50), st.floats(0, 10))
def test_a_time_is_always_within_the_range_that_it_is_converted_for(
    parts: list[tuple[int, int]], start_s: float, length_s: float
) -> None:
    ranges = ranges_of(parts)
    timeline = Timeline(ranges)
    reached = timeline.ranges_of(start_s, start_s + length_s)
    assert reached == sorted(set(reached)) != []
    for number in {*reached, timeline.range_at(start_s)}:
        start, end = ranges[number]
        assert start / SAMPLE_RATE <= timeline.in_chunk(start_s, number) <= end / SAMPLE_RATE


@given(lengths, st.integers(0, 100_000), st.integers(0, 200_000))
def test_groups_have_all_ranges_in_order_and_keep_the_limits(parts: list[tuple[int, int]], gap: int, most: int) -> None:
    ranges = ranges_of(parts)
    groups = join_near(ranges, gap=gap, most=most)
    assert [one for group in groups for one in group] == ranges
    for group in groups:
        assert len(group) == 1 or sum(end - start for start, end in group) <= most
        assert all(after[0] - before[1] <= gap for before, after in pairwise(group))


def test_samples_of_the_ranges_follow_each_other() -> None:
    samples = np.arange(100, dtype=np.float32)
    assert Timeline([(10, 12), (50, 53)]).join(samples).tolist() == [10, 11, 50, 51, 52]
    assert Timeline([(10, 12)]).join(samples).tolist() == [10, 11]


@pytest.mark.parametrize(
    ("start_s", "end_s", "reached"),
    [(0, 2, [0]), (1, 4.3, [0]), (3.7, 6, [1]), (1, 4.5, [0, 1]), (3.5, 9, [0, 1, 2]), (3.9, 4.1, [0]), (9, 12, [2])],
)
def test_a_segment_reaches_into_a_range_if_it_lasts_longer_than_the_padding_there(
    start_s: float, end_s: float, reached: list[int]
) -> None:
    second = SAMPLE_RATE
    timeline = Timeline([(0, 4 * second), (10 * second, 14 * second), (20 * second, 22 * second)])
    assert timeline.ranges_of(start_s, end_s) == reached
