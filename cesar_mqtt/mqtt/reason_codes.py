"""Why a connection failed or ended, from the reason codes of MQTT and from socket and TLS errors.

Pure; any thread may call it. Source: MQTT 5.0, section 2.4; paho translates the return codes of 3.1.1 into these.
"""

import ssl

from paho.mqtt.reasoncodes import ReasonCode

from cesar_mqtt.mqtt.broker_url import BrokerUrl, Version
from cesar_mqtt.mqtt.messages import ConnectionFailure, ConnectOptions

UNSUPPORTED_VERSION = 132

_PROTOCOL_ERROR = 130
_CLIENT_ID_NOT_VALID = 133
_BAD_CREDENTIALS = 134
_NOT_AUTHORIZED = 135
_UNAVAILABLE = 136
_BUSY = 137
_BANNED = 138
_SHUTTING_DOWN = 139
_KEEP_ALIVE_TIMEOUT = 141
_TAKEN_OVER = 142

_RETAIN_NOT_SUPPORTED = 154
_QOS_NOT_SUPPORTED = 155
_SHARED_NOT_SUPPORTED = 158

_MISSING_FEATURES = {
    _RETAIN_NOT_SUPPORTED: "Statuses are retained messages: allow these (mosquitto: retain_available true).",
    _QOS_NOT_SUPPORTED: "Jobs and statuses need QoS 1: allow it in the broker (mosquitto: max_qos 1 or 2).",
    _SHARED_NOT_SUPPORTED: "Leave consumer.group out, or use a broker with shared subscriptions.",
}
_AWAY = frozenset({_UNAVAILABLE, _BUSY, _SHUTTING_DOWN})
_FINAL = frozenset(
    {UNSUPPORTED_VERSION, _CLIENT_ID_NOT_VALID, _BAD_CREDENTIALS, _NOT_AUTHORIZED, _BANNED, *_MISSING_FEATURES}
)

_SHORT_S = 60.0
"""A connection that ends within this time is suspicious: two clients of one client id disconnect each other."""

# OpenSSL's verification results (x509_vfy.h).
_NAME_MISMATCHES = frozenset({62, 64})  # host name, IP address
_TLS_ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": "Set broker.ca_file to the authority that signed its certificate.",
    "WRONG_VERSION_NUMBER": "That port does not speak TLS: name its TLS port, or write mqtt:// without the s.",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "Set broker.cert_file and broker.key_file.",
}


def is_unsupported(connack: ReasonCode | None) -> bool:
    """Whether CONNACK says that the broker does not support this version of MQTT."""
    return connack is not None and connack.value == UNSUPPORTED_VERSION


def is_final(connack: ReasonCode | None) -> bool:
    """Whether CONNACK is a refusal that another attempt does not change."""
    return connack is not None and connack.value in _FINAL


def is_missing_feature(reason: ReasonCode) -> bool:
    """Whether a CONNACK or DISCONNECT says that the broker lacks something that the consumer cannot do without."""
    return reason.value in _MISSING_FEATURES


def failure_of_http(address: BrokerUrl) -> ConnectionFailure:
    """Return why there is no connection to a port that answers in HTTP."""
    scheme = "wss" if address.encrypted else "ws"
    host = f"[{address.host}]" if ":" in address.host else address.host
    advice = f"If that port is for WebSockets, write {scheme}://{host}:{address.port}."
    return ConnectionFailure(f"{address.redacted} answers in HTTP, not in MQTT", advice)


def is_malformed_packet(reason: ReasonCode) -> bool:
    """Whether paho ended the connection because it received a malformed packet."""
    return bool(reason.value == _PROTOCOL_ERROR)


def failure_of_error(error: OSError) -> ConnectionFailure:
    """Translate the error of an attempt to connect."""
    if isinstance(error, TimeoutError):
        return ConnectionFailure(str(error), is_timeout=True)
    if not isinstance(error, ssl.SSLError):
        return ConnectionFailure(error.strerror or str(error))
    advice = _TLS_ADVICE.get(getattr(error, "reason", None) or "", "")
    if getattr(error, "verify_code", None) in _NAME_MISMATCHES:
        advice = "Put a name that stands in its certificate into broker.url."
    return ConnectionFailure(str(error), advice)


def failure_of_connack(connack: ReasonCode, options: ConnectOptions, version: Version) -> ConnectionFailure:
    """Translate a refusal of CONNECT."""
    where, code = options.address.redacted, connack.value
    if code == UNSUPPORTED_VERSION:
        return ConnectionFailure(f"{where} does not support MQTT {version}", "See broker.protocol.", code)
    if code == _CLIENT_ID_NOT_VALID:
        return ConnectionFailure(f"{where} rejects the client id '{options.client_id}'", "See consumer.name.", code)
    advice = "Check broker.username and broker.password_file." if is_final(connack) else ""
    advice = _MISSING_FEATURES.get(code, advice)
    return ConnectionFailure(f"{where} refused this client: {connack}", advice, code)


def failure_of_disconnect(
    reason: ReasonCode, options: ConnectOptions, *, by_broker: bool, connected_s: float
) -> ConnectionFailure | None:
    """Translate the end of a connection that the broker had accepted; None: no reason is known.

    Args:
        reason: the reason of the broker's DISCONNECT, or paho's own.
        options: those of the connection.
        by_broker: whether the broker sent DISCONNECT.
        connected_s: for how many seconds the connection was ready.
    """
    name, code = options.client_id, reason.value if by_broker else None
    if by_broker and code == _TAKEN_OVER:
        advice = "Each client needs its own client id (consumer.name)."
        return ConnectionFailure(f"another client connected with the client id '{name}'", advice, code)
    if by_broker:
        away = code in _AWAY
        problem, advice = f"the broker closed the connection: {reason}", _MISSING_FEATURES.get(reason.value, "")
        return ConnectionFailure(problem, advice, code, is_broker_away=away)
    if reason.value == _KEEP_ALIVE_TIMEOUT:
        return ConnectionFailure("the broker did not answer a ping within the keepalive time", is_timeout=True)
    if is_malformed_packet(reason):
        return ConnectionFailure("the broker sent a malformed packet")
    if options.persistent and 0.0 < connected_s < _SHORT_S:
        # Mosquitto 2.0.11 sends no reason when another client takes over. The client id of an ephemeral client is
        # random, so no other client has it.
        advice = f"If this repeats, check that no other client uses the client id '{name}'."
        return ConnectionFailure("closed shortly after connecting", advice)
    return None
