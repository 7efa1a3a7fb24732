import csv
import html
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import srt  # type: ignore[import-untyped]
import webvtt
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cesar_mqtt.jobs import AudioSource
from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.formats import Content, content_of, render
from cesar_mqtt.protocol.payloads import segment_fields
from cesar_mqtt.transcript import Segment, Word
from tests import factories

Cue = tuple[int, int, str]
"""Start and end in milliseconds, and the text."""
HOUR_MS = 3_600_000


def segment(start_s: float, end_s: float, text: str, **fields: Any) -> Segment:
    defaults: dict[str, Any] = {"id": 1, "avg_logprob": -0.25, "no_speech_prob": 0.01}
    return Segment(start_s=start_s, end_s=end_s, text=text, **{**defaults, **fields})


def content(*segments: Segment, text: str | None = None) -> Content:
    joined = " ".join(each.text for each in segments).strip() if text is None else text
    return Content(joined, segments, "en", 0.98, 60.5, "transcribe")


def whole(name: str, of: Content) -> str:
    payload, cut = render(name, of)
    assert not cut
    return payload.decode()


TWO = content(
    segment(0.0, 1.5, "Hello there.", id=1), segment(1.5, 3.25, "This is a test.", id=2, words=(Word(1.5, 2, " T", 1),))
)
SILENT = replace(content(), language=None, language_probability=None)


# -- readers that others wrote ---------------------------------------------------------------------------------------


def read_txt(payload: bytes) -> list[str]:
    return payload.decode().removesuffix("\n").split("\n") if payload != b"\n" else []


def read_srt(payload: bytes) -> list[Cue]:
    subtitles = list(srt.parse(payload.decode()))
    assert [each.index for each in subtitles] == list(range(1, len(subtitles) + 1))
    millisecond = timedelta(milliseconds=1)
    return [(each.start // millisecond, each.end // millisecond, each.content) for each in subtitles]


def read_vtt(payload: bytes) -> list[Cue]:
    captions = webvtt.from_string(payload.decode(), strict=True).captions
    assert payload.startswith(b"WEBVTT\n\n")
    assert not any(str(caption.settings) for caption in captions)
    return [(clock_ms(each.start), clock_ms(each.end), html.unescape("\n".join(each.lines or ()))) for each in captions]


def clock_ms(text: str) -> int:
    hours, minutes, seconds = text.split(":")
    return int(hours) * HOUR_MS + int(minutes) * 60_000 + int(seconds.replace(".", ""))


def read_tsv(payload: bytes) -> list[Cue]:
    text = payload.decode()
    header, *rows = csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == ["start", "end", "text"]
    return [(int(start), int(end), said) for start, end, said in rows]


def read_md(payload: bytes) -> list[tuple[str, str]]:
    """The headings below the title, each with the paragraph that follows it."""
    tokens = MarkdownIt().parse(payload.decode())
    assert [(each.type, each.tag) for each in tokens[:1]] == [("heading_open", "h1")]
    found: list[tuple[str, str]] = []
    for before, token in pairwise(tokens):
        shown = "".join(child.content for child in token.children or ())
        if before.type == "heading_open" and before.tag == "h2":
            found.append((shown, ""))
        elif before.type == "paragraph_open" and not before.hidden:
            found.append((found.pop()[0] if found else "", shown))
    return found


def read_json(payload: bytes) -> dict[str, Any]:
    document = json.loads(payload)
    assert list(document) == [
        "text",
        "language",
        "language_probability",
        "duration",
        "task",
        "truncated",
        "segments",
    ]
    return dict(document)


# -- each format -----------------------------------------------------------------------------------------------------


def test_plain_text_has_a_line_for_each_segment_as_whispers() -> None:
    assert whole("txt", TWO) == "Hello there.\nThis is a test.\n"


def test_markdown_has_a_title_the_facts_and_paragraphs_headed_by_their_time() -> None:
    later = content(*TWO.segments, segment(3725.0, 3727.0, "Much later.", id=3))
    of = replace(later, title="talk_1.mp3", source="notes/talk_1.mp3", model="base")
    assert whole("md", of) == (
        "# talk\\_1.mp3\n\n- Recording: notes/talk\\_1.mp3\n- Duration: 00:01:00\n- Language: English\n- Model: base\n"
        "\n## 00:00:00\n\nHello there. This is a test.\n\n## 01:02:05\n\nMuch later.\n"
    )


def test_markdown_begins_a_paragraph_at_the_end_of_a_sentence_after_a_minute() -> None:
    told = [("One,", 0), ("two", 30), ("and three.", 59), ("Four.", 61), ("Five.", 90)]
    of = content(*(segment(start, start + 2.0 if start > 50 else start + 29.0, text) for text, start in told))
    assert read_md(render("md", of)[0]) == [
        ("00:00:00", "One, two and three."),
        ("00:01:01", "Four."),
        ("00:01:30", "Five."),
    ]


@pytest.mark.parametrize(
    ("metadata", "audio", "title"),
    [
        ({"file": "Café.m4a"}, ("spool", "0001"), "Café.m4a"),
        ({"file": 7}, ("spool", "0001"), "a"),
        ({}, ("path", "notes/talk.wav"), "talk.wav"),
        ({}, ("url", "http://user:secret@host/talks/1.mp3?key=2"), "1.mp3"),
        ({}, ("url", "http://host/"), "host"),
    ],
)
def test_the_title_is_the_name_of_the_file_or_the_id(
    metadata: dict[str, Any], audio: tuple[str, str], title: str
) -> None:
    job = factories.job(metadata=metadata, audio=AudioSource(*audio), result_text="")
    assert content_of(job, ()).title == title


def test_plain_text_is_one_line_when_only_the_whole_text_was_kept() -> None:
    text_alone = replace(TWO, segments=())
    assert whole("txt", text_alone) == "Hello there. This is a test.\n"
    assert render("txt", text_alone, limit_bytes=20) == (b"Hello there. This\n", True)
    assert render("txt", text_alone, limit_bytes=0) == (b"\n", True)


def test_subrip_numbers_its_cues_and_separates_milliseconds_by_a_comma() -> None:
    assert whole("srt", TWO) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello there.\n\n2\n00:00:01,500 --> 00:00:03,250\nThis is a test.\n\n"
    )


def test_webvtt_has_its_header_and_separates_milliseconds_by_a_point() -> None:
    assert whole("vtt", TWO) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello there.\n\n00:00:01.500 --> 00:00:03.250\nThis is a test.\n\n"
    )


def test_the_table_has_whispers_columns_in_milliseconds() -> None:
    assert whole("tsv", TWO) == "start\tend\ttext\n0\t1500\tHello there.\n1500\t3250\tThis is a test.\n"


def test_json_has_the_text_what_is_known_of_it_and_its_segments() -> None:
    assert read_json(render("json", TWO)[0]) == {
        "text": "Hello there. This is a test.",
        "language": "en",
        "language_probability": 0.98,
        "duration": 60.5,
        "task": "transcribe",
        "truncated": False,
        "segments": [
            {
                "id": 1,
                "start": 0.0,
                "end": 1.5,
                "text": "Hello there.",
                "avg_logprob": -0.25,
                "no_speech_prob": 0.01,
            },
            {
                "id": 2,
                "start": 1.5,
                "end": 3.25,
                "text": "This is a test.",
                "avg_logprob": -0.25,
                "no_speech_prob": 0.01,
                "words": [{"word": " T", "start": 1.5, "end": 2, "probability": 1}],
            },
        ],
    }


def test_json_keeps_words_that_were_asked_for_even_if_there_are_none() -> None:
    assert "words" not in segment_fields(segment(0, 1, "a"))
    assert segment_fields(segment(0, 1, "a", words=()))["words"] == []


def test_a_job_gives_the_files_what_its_status_has() -> None:
    job = factories.job(
        state="completed",
        options={"task": "translate"},
        result_text="Hello there. This is a test.",
        detected_language="en",
        language_probability=0.98,
        audio_duration=60.5,
    )
    ours = replace(TWO, title="a.wav", source="a.wav", model="base")
    assert content_of(job, TWO.segments) == replace(ours, task="translate", has_words=False)
    assert content_of(job._replace(options={"word_timestamps": True}), TWO.segments) == ours
    options = {"max_line_width": 20, "max_line_count": 1, "word_timestamps": True}
    narrow = replace(ours, max_line_width=20, max_line_count=1)
    assert content_of(job._replace(options=options), TWO.segments) == narrow


def test_words_that_were_computed_for_subtitles_are_not_in_json() -> None:
    (first, second) = read_json(render("json", replace(TWO, has_words=False))[0])["segments"]
    assert "words" not in first | second


def test_subtitles_are_as_wide_and_as_high_as_asked_for() -> None:
    of = replace(content(segment(0.0, 4.0, "one two three four five six")), max_line_width=10, max_line_count=1)
    assert whole("vtt", of) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.037\none two\n\n00:00:01.185 --> 00:00:02.667\nthree four\n\n"
        "00:00:02.815 --> 00:00:04.000\nfive six\n\n"
    )
    (cue,) = read_srt(render("srt", replace(of, max_line_width=14, max_line_count=2))[0])
    assert cue == (0, 4000, "one two three\nfour five six")


def test_an_unknown_format_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="'doc'"):
        render("doc", TWO)


# -- traps -----------------------------------------------------------------------------------------------------------


def test_without_speech_each_file_is_valid_and_none_is_empty() -> None:
    # An empty retained payload would clear the topic, and a client that waits for the result would wait for ever.
    payloads = {name: render(name, SILENT)[0] for name in FORMATS}
    assert payloads["txt"] == payloads["srt"] == b"\n"
    assert payloads["vtt"] == b"WEBVTT\n\n"
    assert payloads["tsv"] == b"start\tend\ttext\n"
    document = read_json(payloads["json"])
    assert (document["text"], document["language"], document["segments"]) == ("", None, [])
    assert read_txt(payloads["txt"]) == []
    assert read_srt(payloads["srt"]) == read_vtt(payloads["vtt"]) == read_tsv(payloads["tsv"]) == []


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0, "00:00:00,000"),
        (59.9994, "00:00:59,999"),
        (59.9995, "00:01:00,000"),
        (3599.9999, "01:00:00,000"),
        (0.0004, "00:00:00,000"),
        (86_399.999, "23:59:59,999"),
        (359_999.9996, "100:00:00,000"),
        (1_000 * 3600 + 61.002, "1000:01:01,002"),
    ],
)
def test_a_time_is_rounded_as_a_whole_and_has_as_many_hours_as_it_takes(seconds: float, written: str) -> None:
    of = content(segment(seconds, seconds + 1, "a"))
    assert whole("srt", of).splitlines()[1].startswith(f"{written} --> ")
    assert whole("vtt", of).splitlines()[2].startswith(f"{written.replace(',', '.')} --> ")
    [(start_ms, _, _)] = read_vtt(render("vtt", of)[0])
    assert start_ms == read_srt(render("srt", of)[0])[0][0] == read_tsv(render("tsv", of)[0])[0][0]


def test_a_cue_lasts_long_enough_to_be_seen_even_if_its_segment_does_not() -> None:
    of = content(segment(2.0, 2.0, "a"), segment(3.0001, 3.0002, "b"))
    for read, name in ((read_srt, "srt"), (read_vtt, "vtt")):
        assert read(render(name, of)[0]) == [(2000, 2500, "a"), (3000, 3500, "b")]
    assert read_tsv(render("tsv", of)[0]) == [(2000, 2000, "a"), (3000, 3000, "b")]


def test_cues_do_not_overlap_where_segments_do() -> None:
    of = content(segment(0.0, 5.0, "a"), segment(1.0, 2.0, "b"))
    for read, name in ((read_srt, "srt"), (read_vtt, "vtt")):
        assert read(render(name, of)[0]) == [(0, 1000, "a"), (1000, 2000, "b")]
    assert read_tsv(render("tsv", of)[0]) == [(0, 5000, "a"), (1000, 2000, "b")]


HOSTILE = [
    "a\n\nb",
    "a\r\n\r\nb",
    "a\rb",
    "a\tb",
    "a\x00b",
    "a\x0b\x0c\x1c\x1d\x1e\x85b",
    "a\u2028b\u2029c",
    "a \n b",
    "\n2\n00:00:09,000 --> 00:00:10,000\nmade up",
    "00:00:09.000 --> 00:00:10.000",
    "--> <-- --->",
    "7",
    "WEBVTT",
    "NOTE this",
    "STYLE",
    "<b>bold</b> <00:00:01.000> <v Ann>",
    "R&D &amp; &lt; &nbsp;",
    "\"quoted\" 'too', and; more",
    "{\\an8}",
    "مرحبا، هذا اختبار",
    "שלום\u200f (test)",
    "日本語のテキスト。",
    "👩‍👩‍👧‍👦 🇦🇹",
    "\ufeffa",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_breaks_out_of_its_place(text: str) -> None:
    of = content(segment(0.0, 1.0, text, id=1), segment(1.0, 2.0, "after", id=2))
    line = " ".join("".join(" " if is_break(c) else c for c in text).split())
    cues = [(0, 1000, line), (1000, 2000, "after")]
    assert read_txt(render("txt", of)[0]) == [line, "after"]
    no_arrow = line.replace("--->", "->").replace("-->", "->")  # SubRip has no way to write it
    wide = replace(of, max_line_width=1000)
    assert read_srt(render("srt", wide)[0]) == [(0, 1000, no_arrow), cues[1]]
    assert read_vtt(render("vtt", wide)[0]) == cues
    narrow = replace(of, max_line_width=10, max_line_count=10)
    assert as_one_line(read_vtt(render("vtt", narrow)[0])) == as_one_line(cues)
    assert as_one_line(read_srt(render("srt", narrow)[0])) == as_one_line([(0, 1000, no_arrow), cues[1]])
    assert read_tsv(render("tsv", of)[0]) == cues
    assert [each["text"] for each in read_json(render("json", of)[0])["segments"]] == [text, "after"]
    assert [text for _, text in read_md(render("md", replace(of, text=""))[0])] == [f"{line} after".strip()]
    assert b"-->" not in render("vtt", of)[0].replace(b".000 --> 00:00:0", b"")


def as_one_line(cues: Sequence[Cue]) -> str:
    return "".join("".join(text.split()) for _, _, text in cues)


def is_break(character: str) -> bool:
    return character in "\t\x7f\u2028\u2029" or ord(character) < 0x20 or 0x80 <= ord(character) < 0xA0


@pytest.mark.parametrize("nothing", ["", " ", "\n", "\x00\t"])
def test_a_segment_without_a_text_stands_in_json_alone(nothing: str) -> None:
    of = content(segment(0.0, 1.0, "a"), segment(1.0, 2.0, nothing), segment(2.0, 3.0, "b"))
    assert read_txt(render("txt", of)[0]) == ["a", "b"]
    for read, name in ((read_srt, "srt"), (read_vtt, "vtt"), (read_tsv, "tsv")):
        assert read(render(name, of)[0]) == [(0, 1000, "a"), (2000, 3000, "b")]
    assert len(read_json(render("json", of)[0])["segments"]) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_half_a_surrogate_pair_becomes_a_question_mark(name: str) -> None:
    of = content(segment(0.0, 1.0, "a\ud83d", words=(Word(0.0, 1.0, " \udc00", 0.5),)))
    assert "a?" in whole(name, of)


# -- speakers --------------------------------------------------------------------------------------------------------

CALL = content(
    segment(0.0, 1.0, "Who is there?", id=1, speaker="Speaker 1", words=(Word(0.0, 1.0, " Who is there?", 1.0),)),
    segment(1.5, 2.5, "Speaker 1: me.", id=2, speaker="Speaker 2"),
    segment(2.5, 3.0, "Ada.", id=3, speaker="Speaker 2"),
    segment(3.0, 4.0, "(a door)", id=4),
)


def test_plain_text_names_the_speaker_of_each_line() -> None:
    assert read_txt(render("txt", CALL)[0]) == [
        "Speaker 1: Who is there?",
        "Speaker 2: Speaker 1: me.",
        "Speaker 2: Ada.",
        "(a door)",
    ]


def test_subrip_names_the_speaker_of_each_cue() -> None:
    assert [text for *_, text in read_srt(render("srt", CALL)[0])] == read_txt(render("txt", CALL)[0])


def test_webvtt_has_a_voice_for_each_cue() -> None:
    captions = webvtt.from_string(whole("vtt", CALL), strict=True).captions
    assert [(each.voice, each.text) for each in captions] == [
        ("Speaker 1", "Who is there?"),
        ("Speaker 2", "Speaker 1: me."),
        ("Speaker 2", "Ada."),
        (None, "(a door)"),
    ]


def test_markdown_begins_a_paragraph_where_the_speaker_changes() -> None:
    assert read_md(render("md", CALL)[0]) == [
        ("Speaker 1, 00:00:00", "Who is there?"),
        ("Speaker 2, 00:00:01", "Speaker 1: me. Ada."),
        ("00:00:03", "(a door)"),
    ]


def test_json_has_the_speaker_of_segments_and_of_words() -> None:
    segments = read_json(render("json", CALL)[0])["segments"]
    assert [each.get("speaker") for each in segments] == ["Speaker 1", "Speaker 2", "Speaker 2", None]
    assert [word["speaker"] for word in segments[0]["words"]] == ["Speaker 1"]
    assert "speaker" not in segments[3]


def test_the_table_has_no_speakers() -> None:
    silent = replace(CALL, segments=[replace(each, speaker=None) for each in CALL.segments])
    assert render("tsv", CALL) == render("tsv", silent)


@pytest.mark.parametrize("name", ["Ada\n\nByron", "R&D <v Ann>", "--> 00:00:09.000", "# *Ada* [x](y)", "Ada\u2028: x"])
def test_no_name_of_a_speaker_breaks_out_of_its_place(name: str) -> None:
    of = content(segment(0.0, 1.0, "a", id=1, speaker=name), segment(1.0, 2.0, "b", id=2, speaker="Speaker 2"))
    line = " ".join("".join(" " if is_break(c) else c for c in name).split())
    assert read_txt(render("txt", of)[0]) == [f"{line}: a", "Speaker 2: b"]
    assert read_srt(render("srt", of)[0]) == [
        (0, 1000, f"{line.replace('-->', '->')}: a"),
        (1000, 2000, "Speaker 2: b"),
    ]
    assert f"\n<v {html.escape(line, quote=False)}>a\n" in whole("vtt", of)
    assert [times for *times, _ in read_vtt(render("vtt", of)[0])] == [[0, 1000], [1000, 2000]]
    assert read_md(render("md", of)[0]) == [(f"{line}, 00:00:00", "a"), ("Speaker 2, 00:00:01", "b")]
    assert read_json(render("json", of)[0])["segments"][0]["speaker"] == name


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_with_speakers_that_was_cut_is_a_valid_file(format_: str) -> None:
    of = replace(LONG, segments=[replace(each, speaker=f"Speaker {each.id % 2 + 1}") for each in LONG.segments])
    payload, cut = render(format_, of, limit_bytes=2000)
    assert (cut, len(payload) <= 2000) == (True, True)
    assert 0 < count(format_, payload) < 200


# -- a limit ---------------------------------------------------------------------------------------------------------

LONG = content(*(segment(n * 2.0, n * 2.0 + 1.5, f'Nr. {n} "ä"', id=n + 1) for n in range(200)))


def count(name: str, payload: bytes) -> int:
    if name == "txt":
        return len(read_txt(payload))
    if name == "json":
        return len(read_json(payload)["segments"])
    if name == "md":
        return sum(text.count("Nr. ") for _, text in read_md(payload))
    return len({"srt": read_srt, "vtt": read_vtt, "tsv": read_tsv}[name](payload))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_just_the_limit_is_whole(name: str) -> None:
    payload, _ = render(name, LONG)
    assert render(name, LONG, limit_bytes=len(payload)) == (payload, False)
    shorter, cut = render(name, LONG, limit_bytes=len(payload) - 1)
    assert cut
    assert count(name, shorter) == 199


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("limit", [160, 500, 1000, 2000])
def test_a_file_over_the_limit_is_cut_at_a_whole_segment_and_stays_a_valid_file(name: str, limit: int) -> None:
    payload, cut = render(name, LONG, limit_bytes=limit)
    assert cut
    assert len(payload) <= limit
    kept = count(name, payload)
    assert kept < 200
    one_more, _ = render(name, replace(LONG, segments=LONG.segments[: kept + 1], text=begin(kept + 1)))
    assert len(one_more) > limit, "a segment more would have fitted"
    if name != "json":
        assert render(name, LONG)[0].startswith(payload.removesuffix(b"\n"))


def begin(segments: int) -> str:
    return " ".join(each.text for each in LONG.segments[:segments])


def test_json_that_was_cut_is_marked_and_holds_the_text_of_the_segments_that_are_left() -> None:
    document = read_json(render("json", LONG, limit_bytes=2000)[0])
    assert document["truncated"] is True
    assert document["text"] == begin(len(document["segments"]))
    assert document["segments"] == read_json(render("json", LONG)[0])["segments"][: len(document["segments"])]


@pytest.mark.parametrize("name", FORMATS)
def test_a_limit_that_nothing_can_fit_ends_in_the_least_there_is(name: str) -> None:
    payload, cut = render(name, LONG, limit_bytes=0)
    assert cut
    assert payload
    assert count(name, payload) == 0
    assert render(name, SILENT, limit_bytes=0) == (render(name, SILENT)[0], False)


# -- anything at all -------------------------------------------------------------------------------------------------

texts = (
    st.text(max_size=30)
    | st.text(st.sampled_from("\n\r\t -->&<;:,.0123456789W\x00\x85\u2028"), max_size=40)
    | st.sampled_from(HOSTILE)
    | st.text(st.characters(categories=["Cs", "Cc", "Zs", "Lo"]), max_size=10)
)
times = st.floats(0, 400_000, allow_nan=False)


@st.composite
def contents(draw: st.DrawFn) -> Content:
    starts = sorted(draw(st.lists(times, max_size=6)))
    segments = [
        segment(start, start + draw(st.sampled_from([0.0, 0.0004, 1.0]) | times), draw(texts).strip(), id=n)
        for n, start in enumerate(starts, start=1)
    ]
    return content(*segments)


def spoken(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """When something is said that can be seen, in milliseconds."""
    said = (each for each in segments if any(not c.isspace() and not is_break(c) for c in each.text))
    return [(round(each.start_s * 1000), round(each.end_s * 1000)) for each in said]


@given(contents())
@example(content(segment(0, 1, "1\n\n2\n00:00:00,000 --> 00:00:01,000\n"), segment(1, 2, "\n")))
def test_any_transcript_is_read_back_by_readers_of_others_with_every_time_in_its_place(of: Content) -> None:
    expected = spoken(of.segments)
    for cues in (read_srt(render("srt", of)[0]), read_vtt(render("vtt", of)[0])):
        assert len(cues) >= len(expected)
        assert all(0 < end - start <= 7000 for start, end, _ in cues)
        assert all(before[1] <= after[0] for before, after in pairwise(cues))
        assert all(text for _, _, text in cues)
    assert [(start, end) for start, end, _ in read_tsv(render("tsv", of)[0])] == expected
    assert len(read_txt(render("txt", of)[0])) == len(expected)
    assert len(read_json(render("json", of)[0])["segments"]) == len(of.segments)


@given(contents(), st.sampled_from(FORMATS), st.integers(0, 1500))
def test_any_transcript_is_a_valid_file_within_any_limit(of: Content, name: str, limit: int) -> None:
    payload, cut = render(name, of, limit_bytes=limit)
    least = len(render(name, replace(of, segments=()))[0]) if name != "json" else 160
    full, _ = render(name, of)
    assert len(payload) <= max(limit, least)
    assert cut is (len(payload) < len(full))
    assert cut or payload == full
    assert payload
    assert count(name, payload) <= (len(of.segments) if name not in ("srt", "vtt") else count(name, full))
