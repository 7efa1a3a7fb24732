"""What comes in, on its way to whoever fetches it, without a network."""

from dataclasses import replace
from typing import Any

import pytest

from cesar_mqtt.handoff import Delivery, HandOff, Receipt

SMALL = Delivery("t", b"", 1, retain=False, dup=False, receipt=Receipt(1, 1))
LARGE = "x" * 60_000


@pytest.mark.parametrize(
    "held",
    [
        {"payload": LARGE.encode()},
        {"topic": LARGE},
        {"response_topic": LARGE},
        {"correlation_data": LARGE.encode()},
        {"user_properties": (("name", LARGE),)},
        {"user_properties": ((LARGE, "value"),)},
        {"user_properties": (("\U0001f600" * 15_000, ""),)},
        {"user_properties": (("", ""),) * 400},
    ],
)
def test_what_waits_is_bounded_in_bytes_whatever_it_holds(held: dict[str, Any]) -> None:
    hand_off = HandOff(2000, 200_000, on_room=lambda: None)
    assert [hand_off.put(replace(SMALL, **held)) for _ in range(4)] == [True, True, True, False]
    assert len(hand_off.take(0)) == 3
    assert hand_off.put(replace(SMALL, payload=bytes(10_000_000))), "one always fits"
    assert not hand_off.put(SMALL)
