import io
import json
import logging
import re
import warnings

import pytest

from cesar_mqtt import logs

OURS = logs.get_logger("cesar_mqtt.consumer.worker")


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def fail() -> None:
    raise ValueError("first line\nsecond line\x1b")


def test_a_text_line_is_time_level_message_and_job(stream: io.StringIO) -> None:
    logs.configure("text", "info", stream)
    OURS.info("transcribed in %.1f s", 1.25, action="job_finished", job_id="porch-17", speed=6.5)
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d info    transcribed in 1\.2 s \(job porch-17\)\n"
    assert re.fullmatch(line, stream.getvalue())


def test_a_text_line_without_a_job_ends_with_the_message(stream: io.StringIO) -> None:
    logs.configure("text", "info", stream)
    OURS.warning("the broker is gone", action="broker_lost")
    assert stream.getvalue().endswith(" warning the broker is gone\n")


def test_text_from_outside_can_neither_break_a_line_nor_steer_the_terminal(stream: io.StringIO) -> None:
    logs.configure("text", "info", stream)
    OURS.info("%s", "a\nb\x1b[31m\x9b\u2028\udc80 Grüße", action="read", job_id="x\r")
    assert stream.getvalue().endswith("a\\nb\\x1b[31m\\x9b\\u2028\\udc80 Grüße (job x\\r)\n")
    assert stream.getvalue().count("\n") == 1


def test_a_traceback_follows_its_text_line_indented(stream: io.StringIO) -> None:
    logs.configure("text", "info", stream)
    try:
        fail()
    except ValueError:
        OURS.error("failed", action="job_failed", exc_info=True)
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in rest)
    assert rest[-1] == "    second line\\x1b"


def test_a_json_line_is_one_object_with_the_fields_of_the_event(stream: io.StringIO) -> None:
    logs.configure("json", "info", stream)
    OURS.info("took %s s", 2, action="job_finished", job_id="porch-17", speed=6.5, name="a\nb")
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "info",
        "logger": "cesar_mqtt.consumer.worker",
        "message": "took 2 s",
        "action": "job_finished",
        "job_id": "porch-17",
        "speed": 6.5,
        "name": "a\nb",
    }


def test_a_traceback_is_one_field_of_its_json_line(stream: io.StringIO) -> None:
    logs.configure("json", "info", stream)
    with pytest.raises(ValueError, match="first") as caught:
        fail()
    OURS.error("failed", action="job_failed", exc_info=caught.value)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: first line\nsecond line\x1b")


def test_json_lines_are_json_whatever_the_fields_are(stream: io.StringIO) -> None:
    logs.configure("json", "info", stream)
    OURS.info("m", action="odd", nan=float("nan"), what={1}, name="\udc80", message="x", none=None)
    record = json.loads(stream.getvalue())
    assert record["nan"] is None
    assert record["what"] == "{1}"
    assert record["name"] == "\udc80"
    assert record["none"] is None
    assert (record["message"], record["level"]) == ("m", "info")


def test_a_record_of_another_package_is_formatted_too(stream: io.StringIO) -> None:
    logs.configure("json", "info", stream)
    logging.getLogger("amqtt.broker").warning("a %s", "b")
    record = json.loads(stream.getvalue())
    assert (record["logger"], record["message"]) == ("amqtt.broker", "a b")
    assert "action" not in record


@pytest.mark.parametrize("name", ["amqtt.broker", "transitions.core", "faster_whisper", "httpx2", "asyncio"])
def test_other_packages_are_heard_from_warning_on(stream: io.StringIO, name: str) -> None:
    logs.configure("text", "info", stream)
    logging.getLogger(name).info("quiet")
    logging.getLogger(name).warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_debug_lets_other_packages_speak_but_not_amqtt_about_packets(stream: io.StringIO) -> None:
    logs.configure("text", "debug", stream)
    logging.getLogger("httpx2").debug("heard")
    logging.getLogger("amqtt.broker.plugins.packet_logger_plugin").debug("ConnectPacket(password=secret)")
    OURS.debug("ours")
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["heard", "ours"]


def test_the_level_holds_for_everybody(stream: io.StringIO) -> None:
    logs.configure("text", "error", stream)
    logger = logging.getLogger("huggingface_hub")
    logger.setLevel(logging.WARNING)  # as that package does when it is imported
    logger.warning("quiet")
    OURS.warning("quiet")
    OURS.error("loud")
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["loud"]


def test_an_adopted_logger_speaks_once_and_in_our_format(stream: io.StringIO) -> None:
    own = io.StringIO()
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(logging.StreamHandler(own))
    logger.setLevel(logging.DEBUG)
    logs.configure("json", "info", stream)
    logs.adopt("huggingface_hub")
    logger.info("quiet")
    logger.warning("loud")
    assert own.getvalue() == ""
    assert json.loads(stream.getvalue())["message"] == "loud"


def test_configuring_again_replaces_the_first_stream_and_leaves_foreign_handlers(stream: io.StringIO) -> None:
    foreign = logging.NullHandler()
    logging.getLogger().addHandler(foreign)
    first = io.StringIO()
    logs.configure("text", "info", first)
    logs.configure("text", "info", stream)
    OURS.info("once")
    assert first.getvalue() == ""
    assert stream.getvalue().count("once") == 1
    assert foreign in logging.getLogger().handlers


def test_the_default_stream_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "info")
    OURS.info("here")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("here\n")


def test_warnings_of_libraries_become_log_lines(stream: io.StringIO) -> None:
    logs.configure("json", "info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", UserWarning, stacklevel=1)
    record = json.loads(stream.getvalue())
    assert record["logger"] == "py.warnings"
    assert "UserWarning: old" in record["message"]


def test_a_message_below_the_level_is_not_even_put_together(stream: io.StringIO) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("formatted")

    logs.configure("text", "info", stream)
    OURS.debug("%s", Costly(), action="detail")
    assert stream.getvalue() == ""


def test_an_event_names_the_caller_as_its_place(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cesar_mqtt"):
        OURS.info("m", action="a")
    assert caplog.records[0].funcName == "test_an_event_names_the_caller_as_its_place"


def test_a_line_that_cannot_be_written_stops_nothing(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("text", "info", stream)
    monkeypatch.setattr(stream, "write", lambda _: (_ for _ in ()).throw(BrokenPipeError()))
    OURS.info("without a reader")
    assert capsys.readouterr().err == ""
