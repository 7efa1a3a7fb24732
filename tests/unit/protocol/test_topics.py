import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cesar_mqtt.protocol.topics import JOB_ID_PATTERN, Topics, is_job_id

TOPICS = Topics("cesar", "kitchen")


@pytest.mark.parametrize("job_id", ["a", "porch-17", "A_b-9", "-", "_", "x" * 64])
def test_letters_digits_underscores_and_hyphens_make_an_id(job_id: str) -> None:
    assert is_job_id(job_id)


@pytest.mark.parametrize(
    "job_id",
    ["", "x" * 65, "a b", "a/b", "a+", "#", "a.wav", "a\n", "\na", "a\0", "ä", "١٢٣", "ａ", "../x", "$SYS", "a:b"],  # noqa: RUF001
)
def test_nothing_else_makes_an_id(job_id: str) -> None:
    assert not is_job_id(job_id)


@given(st.text(max_size=70))
@example("a\n")
def test_the_check_and_the_published_pattern_agree(text: str) -> None:
    assert is_job_id(text) == (re.fullmatch(JOB_ID_PATTERN, text) is not None)


def test_every_topic_of_the_contract_stands_under_the_prefix() -> None:
    assert TOPICS.jobs == "cesar/jobs"
    assert TOPICS.audio("porch-17") == "cesar/audio/porch-17"
    assert TOPICS.audio_filter == "cesar/audio/#"
    assert TOPICS.status("porch-17") == "cesar/status/porch-17"
    assert TOPICS.result("porch-17", "srt") == "cesar/result/porch-17/srt"
    assert TOPICS.segments("porch-17") == "cesar/segments/porch-17"
    assert TOPICS.request_filter == "cesar/request/#"
    assert TOPICS.response("cancel") == "cesar/response/cancel"
    assert TOPICS.rejected == "cesar/rejected"
    assert TOPICS.own("state") == "cesar/consumer/kitchen/state"


def test_a_prefix_may_have_several_levels() -> None:
    topics = Topics("house/up-stairs/cesar", "c")
    assert topics.jobs == "house/up-stairs/cesar/jobs"
    assert topics.audio_job_id("house/up-stairs/cesar/audio/x") == "x"
    assert topics.audio_job_id("cesar/audio/x") is None


@pytest.mark.parametrize(
    ("topic", "found"),
    [
        ("cesar/audio/porch-17", "porch-17"),
        ("cesar/audio", ""),  # `cesar/audio/#` matches its parent level, too (MQTT 5, section 4.7.1.2)
        ("cesar/audio/", ""),
        ("cesar/audio/a/b", "a/b"),
        ("cesar/audio//a", "/a"),
        ("cesar/jobs", None),
        ("cesar/audiobook/a", None),
        ("other/cesar/audio/a", None),
        ("CESAR/audio/a", None),
    ],
)
def test_an_audio_topic_gives_away_what_stands_in_the_place_of_the_id(topic: str, found: str | None) -> None:
    assert TOPICS.audio_job_id(topic) == found


@given(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_what_goes_into_an_audio_topic_comes_out_of_it(job_id: str) -> None:
    assert TOPICS.audio_job_id(TOPICS.audio(job_id)) == job_id


@pytest.mark.parametrize(
    ("topic", "command"),
    [
        ("cesar/request/cancel", "cancel"),
        ("cesar/request", ""),
        ("cesar/request/", ""),
        ("cesar/request/a/b", "a/b"),
        ("cesar/requests/cancel", None),
        ("cesar/response/cancel", None),
        ("cesar/jobs", None),
        ("other/cesar/request/cancel", None),
    ],
)
def test_a_request_topic_gives_away_what_stands_in_the_place_of_the_command(topic: str, command: str | None) -> None:
    assert TOPICS.request_command(topic) == command


@pytest.mark.parametrize(
    ("topic", "own"),
    [
        ("cesar/jobs", True),
        ("cesar/jobs/a", True),
        ("cesar/audio", True),
        ("cesar/audio/a", True),
        ("cesar/request/cancel", True),
        ("cesar/status/a", True),
        ("cesar/result/a/srt", True),
        ("cesar/segments/a", True),
        ("cesar/events", True),
        ("cesar/rejected", True),
        ("cesar/consumer/attic/state", True),
        ("cesar/response/me", False),
        ("cesar/replies/1", False),
        ("cesar/jobs-done", False),
        ("cesar", False),
        ("replies/1", False),
        ("other/cesar/jobs", False),
    ],
)
def test_an_answer_may_go_to_every_topic_that_has_no_meaning_of_its_own(topic: str, *, own: bool) -> None:
    assert TOPICS.is_own(topic) is own


@pytest.mark.parametrize(
    ("topic", "meant"),
    [("cesar/jobs", True), ("cesar/audio/a", True), ("cesar/audio", True), ("cesar/request/x", False)],
)
def test_jobs_and_audio_are_meant_to_become_jobs_and_nothing_else_is(topic: str, *, meant: bool) -> None:
    assert TOPICS.is_submission(topic) is meant
