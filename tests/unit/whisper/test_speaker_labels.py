from cesar_mqtt.transcript import Segment, Window, Word
from cesar_mqtt.whisper.speaker_labels import SpokenTurn, label_windows
from tests import factories

ONE, TWO = "Speaker 1", "Speaker 2"


def spoken(*texts: str, start_s: float = 0.0) -> tuple[Word, ...]:
    """Words of half a second each."""
    return tuple(
        Word(start_s + number / 2, start_s + (number + 1) / 2, f" {text}", 0.9) for number, text in enumerate(texts)
    )


def segment(number: int, *texts: str, start_s: float = 0.0) -> Segment:
    words = spoken(*texts, start_s=start_s)
    return factories.segment(number, " ".join(texts), start_s=start_s, end_s=words[-1].end_s, words=words)


def labelled(windows: list[Window], *turns: SpokenTurn) -> list[tuple[int, str, str | None]]:
    found = label_windows(windows, turns)
    return [(part.id, part.text, part.speaker) for window in found for part in window.segments]


def test_a_segment_is_split_where_the_speaker_changes_and_the_ids_count_on_over_windows() -> None:
    windows = [
        factories.window(0, segment(1, "Hello", "there.", "Yes?", "What?")),
        factories.window(1, segment(2, "Good", "morning.", start_s=2.0)),
    ]
    turns = SpokenTurn(0.0, 1.0, ONE), SpokenTurn(1.0, 2.0, TWO), SpokenTurn(2.0, 3.0, ONE)
    assert labelled(windows, *turns) == [(1, "Hello there.", ONE), (2, "Yes? What?", TWO), (3, "Good morning.", ONE)]
    first, second = label_windows(windows, turns)[0].segments
    assert (first.start_s, first.end_s, second.start_s, second.end_s) == (0.0, 1.0, 1.0, 2.0)
    assert [word.text for part in (first, second) for word in part.words or ()] == [
        " Hello",
        " there.",
        " Yes?",
        " What?",
    ]


def test_a_word_goes_to_the_speaker_who_has_most_of_it_and_of_equals_to_the_one_before() -> None:
    window = factories.window(0, segment(1, "a", "b", "c"))
    turns = SpokenTurn(0.0, 0.7, ONE), SpokenTurn(0.6, 1.5, TWO)
    assert labelled([window], *turns) == [(1, "a", ONE), (2, "b c", TWO)]
    both = SpokenTurn(0.0, 0.5, TWO), SpokenTurn(0.5, 1.5, ONE), SpokenTurn(0.5, 1.5, TWO)
    assert labelled([window], *both) == [(1, "a b c", TWO)]


def test_words_outside_of_all_turns_stay_with_the_one_before_or_go_to_the_nearest() -> None:
    window = factories.window(0, segment(1, "a", "b", "c", start_s=5.0))
    assert labelled([window], SpokenTurn(0.0, 1.0, ONE), SpokenTurn(7.0, 9.0, TWO)) == [(1, "a b c", TWO)]
    assert labelled([window], SpokenTurn(0.0, 4.5, ONE), SpokenTurn(9.0, 10.0, TWO)) == [(1, "a b c", ONE)]
    assert labelled([window], SpokenTurn(5.0, 5.5, ONE), SpokenTurn(6.6, 10.0, TWO)) == [(1, "a b c", ONE)]


def test_without_words_of_the_same_text_a_segment_has_the_speaker_who_has_most_of_it() -> None:
    turns = SpokenTurn(0.0, 0.4, ONE), SpokenTurn(0.4, 1.0, TWO)
    for words in (None, (), spoken("other")):
        window = factories.window(0, factories.segment(1, "Hello.", words=words))
        assert labelled([window], *turns) == [(1, "Hello.", TWO)]


def test_without_turns_nobody_speaks() -> None:
    assert labelled([factories.window(0, segment(1, "a", "b"))]) == [(1, "a b", None)]
    assert label_windows([], []) == ()


def test_a_long_turn_below_many_short_ones_is_found_to_its_end() -> None:
    turns = [SpokenTurn(0.0, 100.0, ONE), *(SpokenTurn(n + 0.9, n + 0.95, TWO) for n in range(100))]
    windows = [factories.window(0, *(segment(n + 1, "word", start_s=float(n)) for n in range(99)))]
    assert {speaker for _, _, speaker in labelled(windows, *turns)} == {ONE}


def test_labelling_what_is_labelled_changes_nothing() -> None:
    windows = [factories.window(0, segment(1, "Hello", "there.", "Yes?"))]
    turns = [SpokenTurn(0.0, 1.0, ONE), SpokenTurn(1.0, 2.0, TWO)]
    once = label_windows(windows, turns)
    assert label_windows(once, turns) == once
