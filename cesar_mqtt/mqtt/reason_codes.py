"""Why a connection ended: the reason codes of MQTT, and what is said of them. Pure; any thread may call it."""

from paho.mqtt.reasoncodes import ReasonCode

from cesar_mqtt.mqtt.broker_url import Version
from cesar_mqtt.mqtt.messages import ConnectOptions

# Reason codes of MQTT 5, section 2.4; paho translates the return codes of 3.1.1 into them.
_PROTOCOL_ERROR = 130
_UNSUPPORTED_VERSION = 132
_CLIENT_ID_NOT_VALID = 133
_BAD_CREDENTIALS = 134
_NOT_AUTHORIZED = 135
_BANNED = 138
_KEEP_ALIVE_TIMEOUT = 141
_TAKEN_OVER = 142

_SOON_S = 60.0


def is_unsupported(answer: ReasonCode | None) -> bool:
    """Whether a broker answered CONNECT with: not in this version of MQTT."""
    return answer is not None and answer.value == _UNSUPPORTED_VERSION


def is_final(answer: ReasonCode | None) -> bool:
    """Whether a broker answered CONNECT with a no that trying again does not change."""
    final = (_UNSUPPORTED_VERSION, _CLIENT_ID_NOT_VALID, _BAD_CREDENTIALS, _NOT_AUTHORIZED, _BANNED)
    return answer is not None and answer.value in final


def is_unreadable(reason: ReasonCode) -> bool:
    """Whether paho ended a connection over a packet that it cannot read."""
    return bool(reason.value == _PROTOCOL_ERROR)


def refusal(answer: ReasonCode, profile: ConnectOptions, version: Version) -> str:
    """Say why a broker does not take this client, and what can be done."""
    where = profile.address.redacted
    if answer.value == _UNSUPPORTED_VERSION:
        return f"{where} does not speak MQTT {version} (broker.protocol)"
    if answer.value == _CLIENT_ID_NOT_VALID:
        return f"{where} does not take '{profile.client_id}' for a client id (consumer.name)"
    advice = "; check broker.username and broker.password_file" if is_final(answer) else ""
    return f"{where} refused this client: {answer}{advice}"


def ending(reason: ReasonCode, profile: ConnectOptions, *, said: bool, held_s: float) -> str | None:
    """Say why a connection ended that had been accepted; None: nobody knows.

    Args:
        reason: paho's, or the broker's own.
        profile: whose connection it was.
        said: whether it is the broker's own.
        held_s: for how many seconds it had stood.
    """
    name = profile.client_id
    if said and reason.value == _TAKEN_OVER:
        return f"another client took the name '{name}'; no two may have the same (consumer.name)"
    if said:
        return f"the broker closed it ({reason})"
    if reason.value == _KEEP_ALIVE_TIMEOUT:
        return "the broker was not heard for too long"
    if is_unreadable(reason):
        return "the broker sent something that paho cannot read"
    if profile.persistent and 0.0 < held_s < _SOON_S:
        # Mosquitto 2.0.11 does not say that another client took over. A name for one connection is nobody else's.
        return f"it was closed soon; if that goes on, another client may have the name '{name}'"
    return None
