"""Why a connection failed or ended: problem, advice and reason code."""

import ssl

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from cesar_mqtt.mqtt import reason_codes
from cesar_mqtt.mqtt.broker_url import Credentials, parse_broker_url
from cesar_mqtt.mqtt.messages import ConnectionFailure, ConnectOptions


def options(*, persistent: bool = True) -> ConnectOptions:
    return ConnectOptions(
        address=parse_broker_url("mqtt://ann:secret@127.0.0.1"),
        credentials=Credentials(),
        tls=None,
        client_id="cesar-submit-0123",
        persistent=persistent,
        will=None,
        subscriptions=(),
        unwanted=(),
        keepalive_s=30,
        receive_maximum=10,
        max_packet_bytes=None,
    )


def ending(reason: str = "Unspecified error", *, persistent: bool = True, by_broker: bool = False) -> str:
    code = ReasonCode(PacketTypes.DISCONNECT, reason)
    failure = reason_codes.failure_of_disconnect(
        code, options(persistent=persistent), by_broker=by_broker, connected_s=1.0
    )
    assert failure is None or failure.reason_code == (code.value if by_broker else None)
    return str(failure)


def test_only_a_persistent_client_id_may_be_in_use_twice() -> None:
    assert "check that no other client uses the client id 'cesar-submit-0123'" in ending()
    assert ending(persistent=False) == "None"


@pytest.mark.parametrize(
    ("reason", "by_broker", "text"),
    [
        ("Session taken over", True, "another client connected with the client id 'cesar-submit-0123'."),
        ("Server shutting down", True, "the broker closed the connection: Server shutting down."),
        ("Keep alive timeout", False, "the broker did not answer a ping within the keepalive time."),
        ("Protocol error", False, "the broker sent a malformed packet."),
    ],
)
def test_the_reason_of_an_ending_is_in_the_failure(reason: str, by_broker: bool, text: str) -> None:  # noqa: FBT001
    assert ending(reason, by_broker=by_broker).startswith(text)


@pytest.mark.parametrize(
    ("reason", "code", "problem", "advice", "final"),
    [
        ("Unsupported protocol version", 132, "does not support MQTT 5", "broker.protocol", True),
        ("Client identifier not valid", 133, "rejects the client id 'cesar-submit-0123'", "consumer.name", True),
        ("Bad user name or password", 134, "refused this client", "broker.password_file", True),
        ("Not authorized", 135, "refused this client", "broker.username", True),
        ("Banned", 138, "refused this client", "broker.username", True),
        ("Server busy", 137, "refused this client: Server busy", "", False),
    ],
)
def test_a_refusal_has_its_code_and_advice(reason: str, code: int, problem: str, advice: str, *, final: bool) -> None:
    connack = ReasonCode(PacketTypes.CONNACK, reason)
    failure = reason_codes.failure_of_connack(connack, options(), "5")
    assert failure.reason_code == code
    assert problem in failure.problem
    assert advice in failure.advice
    assert "secret" not in str(failure)
    assert reason_codes.is_final(connack) is final
    assert reason_codes.is_unsupported(connack) is (code == reason_codes.UNSUPPORTED_VERSION)


def tls_error(kind: type[ssl.SSLError], **attributes: object) -> ssl.SSLError:
    error = kind(1, "[SSL] failed")
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ConnectionRefusedError(111, "Connection refused"), ConnectionFailure("Connection refused")),
        (OSError("no number"), ConnectionFailure("no number")),
        (TimeoutError("timed out"), ConnectionFailure("timed out", is_timeout=True)),
    ],
)
def test_an_error_of_the_socket_becomes_a_failure(error: OSError, failure: ConnectionFailure) -> None:
    assert reason_codes.failure_of_error(error) == failure


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (tls_error(ssl.SSLCertVerificationError, reason="CERTIFICATE_VERIFY_FAILED", verify_code=18), "broker.ca_file"),
        (tls_error(ssl.SSLCertVerificationError, reason="CERTIFICATE_VERIFY_FAILED", verify_code=62), "broker.url"),
        (tls_error(ssl.SSLCertVerificationError, reason="CERTIFICATE_VERIFY_FAILED", verify_code=64), "broker.url"),
        (tls_error(ssl.SSLError, reason="WRONG_VERSION_NUMBER"), "does not speak TLS"),
        (tls_error(ssl.SSLError, reason="TLSV13_ALERT_CERTIFICATE_REQUIRED"), "broker.cert_file"),
        (tls_error(ssl.SSLError), ""),
    ],
)
def test_an_error_of_tls_has_the_setting_that_helps(error: ssl.SSLError, advice: str) -> None:
    failure = reason_codes.failure_of_error(error)
    assert failure.problem == str(error)
    assert advice in failure.advice
    assert bool(advice) is bool(failure.advice)
