"""What any client may publish, as the front doors read it."""

import pytest

from cesar_mqtt.gateway.bus import json_object


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"", {}),
        (b"[1]", {}),
        (b"{", {}),
        (b"\xff", {}),
        (b"[" * 100_000, {}),
        (b'{"a": 1}', {"a": 1}),
        (b'{"a": "\\u00fc\\ud83d\\ude00"}', {"a": "\u00fc\U0001f600"}),
        (b'{"a": "\\ud800", "b\\udfff": 1}', {"a": "?", "b?": 1}),
    ],
)
def test_a_message_is_a_json_object_without_half_characters_or_an_empty_one(
    payload: bytes, expected: dict[str, object]
) -> None:
    assert json_object(payload) == expected
