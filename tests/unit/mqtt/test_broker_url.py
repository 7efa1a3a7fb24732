"""Broker URLs, credentials, TLS contexts and the choice of the MQTT version."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.mqtt.broker_url import (
    BrokerUrl,
    Credentials,
    VersionChoice,
    parse_broker_url,
    read_credentials,
    tls_context,
)
from tests.conftest import IN_CI


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://broker.lan", BrokerUrl("mqtt", "broker.lan", 1883)),
        ("mqtts://broker.lan", BrokerUrl("mqtts", "broker.lan", 8883)),
        ("ws://broker.lan", BrokerUrl("ws", "broker.lan", 80)),
        ("wss://broker.lan/broker?v=1", BrokerUrl("wss", "broker.lan", 443, path="/broker?v=1")),
        ("mqtt://broker.lan:1884/", BrokerUrl("mqtt", "broker.lan", 1884)),
        (" MQTT://Broker.LAN ", BrokerUrl("mqtt", "broker.lan", 1883)),
        ("mqtt://[::1]:1884", BrokerUrl("mqtt", "::1", 1884)),
        ("mqtt://ann@b", BrokerUrl("mqtt", "b", 1883, "ann")),
        ("mqtt://ann:a%3A%2F%40b@b", BrokerUrl("mqtt", "b", 1883, "ann", "a:/@b")),
        ("embedded", BrokerUrl("embedded", "127.0.0.1", 1883)),
        ("embedded://127.0.0.1:0", BrokerUrl("embedded", "127.0.0.1", 0)),
    ],
)
def test_a_url_becomes_an_address(url: str, address: BrokerUrl) -> None:
    assert parse_broker_url(url) == address


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("broker.lan", "begin with mqtt://"),
        ("broker.lan:1883", "begin with mqtt://"),
        ("http://broker.lan", "begin with mqtt://"),
        ("mqtt:broker.lan", "begin with mqtt://"),
        ("", "begin with mqtt://"),
        ("mqtt://", "no host name"),
        ("mqtt://:1883", "no host name"),
        ("mqtt://two words", "no host name"),
        ("mqtt://a..b", "host name is not valid"),
        ("mqtt://" + "a" * 64, "host name is not valid"),
        ("mqtt://[::1", "not an IPv6 address"),
        ("mqtt://b:99999", "port"),
        ("mqtt://b:x", "port"),
        ("mqtt://b:0", "port is 0"),
        ("mqtt://b/path", "path"),
        ("mqtt://b?x=1", "'#' or '?'"),
        ("ws://b/a b", "percent-encoded"),
        ("mqtt://:secret@b", "no user name"),
        ("embedded://ann@127.0.0.1", "has no users"),
    ],
)
def test_an_invalid_url_is_rejected_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=r"^broker\.url ") as refused:
        parse_broker_url(url)
    assert why in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://ann:sec#ret@b",
        "mqtt://ann:sec/ret@b",
        "mqtt://ann:sec?ret@b",
        "mqtt://ann:secret@b:x",
        "mqtt://ann:sec@ret@b/path",
        "mqtt://:secret@b",
        "http://ann:secret@b",
        "ann:secret@b",
        "wss://b:x/?token=secret",
    ],
)
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_broker_url(url)
    assert "sec" not in str(refused.value)
    assert "ret" not in str(refused.value)


def test_an_address_is_shown_without_its_secrets() -> None:
    address = parse_broker_url("wss://ann:secret@[::1]/mqtt?token=secret")
    assert address.redacted == "wss://ann@[::1]:443"
    assert "secret" not in repr(parse_broker_url("mqtt://ann:secret@b"))
    assert "secret" not in repr(Credentials("ann", "secret"))


def test_the_first_line_of_the_password_file_takes_precedence(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes("grüß dich \r\nsecond line\n".encode())
    settings = BrokerSettings(username="bob", password_file=file)
    assert read_credentials(settings, parse_broker_url("mqtt://b")) == Credentials("bob", "grüß dich ")
    assert read_credentials(settings, parse_broker_url("mqtt://ann:x@b")) == Credentials("ann", "grüß dich ")


def test_without_a_password_file_the_url_takes_precedence() -> None:
    assert read_credentials(BrokerSettings(username="bob"), parse_broker_url("mqtt://ann:x@b")) == Credentials(
        "ann", "x"
    )
    assert read_credentials(BrokerSettings(username="bob"), parse_broker_url("mqtt://b")) == Credentials("bob")
    assert read_credentials(BrokerSettings(), parse_broker_url("mqtt://b")) == Credentials()


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "empty"), (b"\nsecret", "empty"), (b"\xff\xfe", "UTF-8"), (None, "No such")]
)
def test_an_invalid_password_file_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    settings = BrokerSettings(username="bob", password_file=file)
    with pytest.raises(ConfigError, match=why) as refused:
        read_credentials(settings, parse_broker_url("mqtt://b"))
    assert str(file) in str(refused.value)


def test_a_password_file_without_a_user_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("secret")
    with pytest.raises(ConfigError, match=r"broker\.username"):
        read_credentials(BrokerSettings(password_file=file), parse_broker_url("mqtt://b"))


@pytest.mark.parametrize("name", ["ca_file", "cert_file"])
@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_an_invalid_tls_file_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    file = tmp_path / "file.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"^broker\.{name} .*file\.pem"):
        tls_context(BrokerSettings.model_validate({name: file}))


def test_a_key_without_a_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"broker\.cert_file is not"):
        tls_context(BrokerSettings(key_file=tmp_path / "key.pem"))


def test_of_certificate_and_key_the_missing_file_is_named(tmp_path: Path) -> None:
    there, missing = tmp_path / "there.pem", tmp_path / "missing.pem"
    there.touch()
    with pytest.raises(ConfigError, match=r"^broker\.key_file .*missing\.pem"):
        tls_context(BrokerSettings(cert_file=there, key_file=missing))
    with pytest.raises(ConfigError, match=r"^broker\.cert_file .*missing\.pem"):
        tls_context(BrokerSettings(cert_file=missing, key_file=there))


@pytest.mark.skipif(shutil.which("openssl") is None and not IN_CI, reason="needs openssl")
def test_an_encrypted_key_is_refused_instead_of_asked_for_at_the_terminal(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-passout",
            "pass:x",
            "-subj",
            "/CN=client",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0
    with pytest.raises(ConfigError, match="not encrypted"):
        tls_context(BrokerSettings(cert_file=certificate, key_file=key))


def test_certificates_and_host_names_are_checked() -> None:
    context = tls_context(BrokerSettings())
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"


def plan(choice: VersionChoice) -> tuple[str, bool]:
    return choice.next, choice.is_temporary


def test_mqtt_5_is_spoken_until_the_broker_reports_that_it_does_not_support_it() -> None:
    choice = VersionChoice("auto")
    assert plan(choice)[0] == "5"
    assert choice.on_ended(unsupported=True)
    assert plan(choice)[0] == "3.1.1"
    assert not choice.on_ended()
    assert plan(choice)[0] == "3.1.1"


def test_a_broker_that_closes_without_an_answer_is_tried_with_both_versions_in_turn() -> None:
    choice = VersionChoice("auto")
    assert choice.on_ended(unanswered=True)
    assert plan(choice)[0] == "3.1.1"
    assert not choice.on_ended(unanswered=True)
    assert plan(choice)[0] == "5"


def test_a_broker_that_is_down_is_still_tried_with_5() -> None:
    choice = VersionChoice("auto")
    assert not choice.on_ended()
    assert plan(choice)[0] == "5"


def test_after_5_was_accepted_a_starting_broker_is_still_tried_with_5() -> None:
    choice = VersionChoice("auto")
    choice.on_connected()
    assert not choice.on_ended(unanswered=True)
    assert plan(choice)[0] == "5"


def test_a_malformed_message_is_received_in_3_1_1() -> None:
    choice = VersionChoice("auto")
    choice.on_connected()
    assert choice.on_ended(malformed=True)
    assert plan(choice) == ("3.1.1", True)
    choice.on_connected()
    assert not choice.on_ended()
    assert plan(choice) == ("5", False)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_configured_version_does_not_change(version: str) -> None:
    choice = VersionChoice("5" if version == "5" else "3.1.1")
    assert not choice.on_ended(unsupported=True)
    assert not choice.on_ended(unanswered=True)
    assert not choice.on_ended(malformed=True)
    assert choice.next == version
