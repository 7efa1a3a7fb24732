"""From segments to cues: what is cut where, and that every cue can be read."""

import unicodedata
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cesar_mqtt.protocol.cues import Cue, cues_of
from cesar_mqtt.transcript import Segment, Word


def segment(start_s: float, end_s: float, text: str, words: tuple[Word, ...] | None = None) -> Segment:
    return Segment(1, start_s, end_s, text, -0.25, 0.01, words)


def spoken(words: Sequence[tuple[str, float, float]]) -> Segment:
    """A segment whose words have these times."""
    timed = tuple(Word(start_s, end_s, text, 0.9) for text, start_s, end_s in words)
    return segment(timed[0].start_s, timed[-1].end_s, "".join(word.text for word in timed).strip(), timed)


def evenly(text: str, *, seconds_a_word: float) -> Segment:
    """A segment whose words, which are separated by blanks, last equally long."""
    return spoken([(f" {word}", n * seconds_a_word, (n + 1) * seconds_a_word) for n, word in enumerate(text.split())])


def cut(*segments: Segment, width: int = 42, count: int = 2) -> list[Cue]:
    return cues_of(
        [(each, " ".join(each.text.split())) for each in segments], max_line_width=width, max_line_count=count
    )


def texts(cues: list[Cue]) -> list[str]:
    return [" ".join(cue.lines) for cue in cues]


def test_a_segment_that_can_be_read_is_one_cue_with_its_times() -> None:
    assert cut(segment(1.0, 3.5, "Hello there.")) == [Cue(1000, 3500, ("Hello there.",))]


def test_a_long_segment_is_cut_at_words_and_each_part_has_the_times_of_its_words() -> None:
    (first, second) = cut(evenly("one two three four five six seven eight", seconds_a_word=1.5))
    assert first == Cue(0, 6000, ("one two three four",))
    assert second == Cue(6000, 12_000, ("five six seven eight",))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Stay here for a while. Nobody knows what will happen to us", "Stay here for a while."),
        ("Stay here for a while, nobody knows what will happen to us", "Stay here for a while,"),
        ('He said "stay for a while." Nobody knows what happens to us', 'He said "stay for a while."'),
        ("Really? Stay here for a while! Nobody knows what will happen", "Really? Stay here for a while!"),
    ],
)
def test_a_cut_comes_after_a_stop_or_a_comma_if_it_can(text: str, first: str) -> None:
    assert texts(cut(evenly(text, seconds_a_word=0.8)))[0] == first


def test_a_cut_comes_in_a_pause_if_it_can() -> None:
    words = [
        (f" word{n}", n * 0.7 + (0.5 if n > 4 else 0.0), n * 0.7 + 0.7 + (0.5 if n > 4 else 0.0)) for n in range(12)
    ]
    first, second = texts(cut(spoken(words)))
    assert (first.split()[-1], second.split()[0]) == ("word4", "word5")


def test_a_cue_spans_no_long_pause_between_words() -> None:
    cues = cut(spoken([(" before", 0.0, 1.0), (" after", 4.0, 5.0)]))
    assert cues == [Cue(0, 1000, ("before",)), Cue(4000, 5000, ("after",))]


def test_a_cue_ends_after_seven_seconds() -> None:
    assert cut(segment(0.0, 29.98, "Hello.")) == [Cue(0, 7000, ("Hello.",))]
    assert cut(spoken([(" Hello.", 10.0, 30.0)])) == [Cue(10_000, 17_000, ("Hello.",))]


def test_a_cue_that_is_too_short_to_be_read_stays_until_the_next_one_but_not_long() -> None:
    assert cut(segment(1.0, 1.2, "Yes.")) == [Cue(1000, 1700, ("Yes.",))]
    assert cut(segment(1.0, 1.2, "Yes."), segment(1.6, 3.0, "No."))[0] == Cue(1000, 1600, ("Yes.",))
    text = "this is said much too fast to be read"
    assert cut(segment(1.0, 2.6, text)) == [Cue(1000, 2850, (text,))]


def test_cues_follow_each_other_even_if_their_segments_do_not() -> None:
    cues = cut(*(segment(2.0, 2.0, text) for text in "abc"), segment(1.0, 1.5, "d"))
    assert cues == [
        Cue(2000, 2500, ("a",)),
        Cue(2500, 3000, ("b",)),
        Cue(3000, 3500, ("c",)),
        Cue(3500, 4000, ("d",)),
    ]


def test_lines_are_even() -> None:
    (cue,) = cut(segment(0.0, 5.0, "There was nobody at the door when we came back"))
    assert cue.lines == ("There was nobody at the", "door when we came back")


def test_words_with_other_text_than_the_segment_do_not_count() -> None:
    words = (Word(0.0, 9.0, " Something", 0.9), Word(9.0, 10.0, " else.", 0.9))
    assert cut(segment(0.0, 3.0, "Hello there.", words)) == [Cue(0, 3000, ("Hello there.",))]


def test_a_word_without_a_blank_before_it_stays_with_the_one_before() -> None:
    words = [(" self", 0.0, 1.0), ("-", 1.0, 1.2), ("driving", 1.2, 3.0), (" cars", 3.0, 4.0)]
    assert texts(cut(spoken(words), width=12, count=1)) == ["self-driving", "cars"]
    assert texts(cut(spoken(words), width=10, count=1)) == ["self-drivi", "ng cars"]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("我们去了河边，那里没有人。", 14, ("我们去了河边，", "那里没有人。")),  # noqa: RUF001 - Chinese
        ("我们去了河边，那里没有人。", 12, ("我们去了河", "边，那里没", "有人。")),  # noqa: RUF001 - Chinese
        ("これはテストです「はい」", 18, ("これはテスト", "です「はい」")),
        ("สวัสดีครับวันนี้", 12, ("สวัสดีครั", "บวันนี้")),
        ("안녕하세요 세계", 12, ("안녕하세요", "세계")),
    ],
)
def test_scripts_without_blanks_are_cut_between_characters(text: str, width: int, lines: tuple[str, ...]) -> None:
    cues = cut(segment(0.0, 5.0, text), width=width, count=3)
    assert [cue.lines for cue in cues] == [lines]
    assert all(columns(line) <= width for line in lines)


def test_the_words_that_whisper_times_in_chinese_are_kept_together() -> None:
    words = [(text, n * 1.0, n + 1.0) for n, text in enumerate(["我们", "去了", "河边", "，", "那里", "没有", "人"])]  # noqa: RUF001 - Chinese
    assert texts(cut(spoken(words), width=10, count=1)) == ["我们去了", "河边，", "那里没有人"]  # noqa: RUF001 - Chinese


def columns(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


# -- anything at all ---------------------------------------------------------------------------------------------------

alphabets = st.sampled_from(["abc. ,?", "ab", "我们。，的", "กำา่เแ ", "かっー「」", "é\u0301 👩\u200d", "-—/' "])  # noqa: RUF001 - Chinese
lines = alphabets.flatmap(lambda alphabet: st.text(alphabet, min_size=1, max_size=150))


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    starts = accumulate(draw(st.lists(st.floats(0, 20), min_size=1, max_size=5)))
    made = []
    for start_s in starts:
        text = draw(lines.map(lambda line: " ".join(line.split())).filter(bool))
        end_s = start_s + draw(st.sampled_from([0.0, 0.0004, 1.0, 30.0]) | st.floats(0, 40))
        words = None
        if draw(st.booleans()):
            times = sorted(draw(st.lists(st.floats(start_s - 1, end_s + 1), min_size=len(text), max_size=len(text))))
            words = tuple(Word(max(0.0, at_s), at_s + 0.3, each, 0.9) for at_s, each in zip(times, text, strict=True))
        made.append(segment(start_s, end_s, text, words))
    return made


@given(segments(), st.integers(10, 60), st.integers(1, 4))
def test_every_cue_can_be_read_and_the_text_is_whole(of: list[Segment], width: int, count: int) -> None:
    cues = cut(*of, width=width, count=count)
    assert all(0 < cue.end_ms - cue.start_ms <= 7000 for cue in cues)
    assert all(before.end_ms <= after.start_ms for before, after in pairwise(cues))
    for cue in cues:
        assert 1 <= len(cue.lines) <= count
        assert all(line.strip() and columns(line) <= width for line in cue.lines)
    said = "".join("".join(line.split()) for cue in cues for line in cue.lines)
    assert said == "".join("".join(each.text.split()) for each in of)
