"""Every way to make a payload fit into a limit: the broker's packets, one response, Home Assistant's attributes.

Pure; any thread may call it. A payload that was cut is marked in its own fields.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic_core import from_json, to_json

from cesar_mqtt.json_codec import encode
from cesar_mqtt.redaction import redact_document, redact_value

if TYPE_CHECKING:
    from cesar_mqtt.protocol.fields import Payload
    from cesar_mqtt.protocol.payloads import JobSegment, Status

Item = TypeVar("Item", bound="Payload")

Data = dict[str, Any]

_SHORT_CHARACTERS = 200
_EXCERPT_BYTES = 200
_PARSED_BYTES = 65_536
_READ_BYTES = 4096  # of a larger payload, or of one that is no JSON
_CONTINUATION, _CONTINUATION_MASK = 0x80, 0xC0


def most_that_fit(count: int, limit_bytes: int, size_bytes: Callable[[int], int]) -> int:
    """Return the largest number from 1 to `count` whose size, which grows with it, keeps the limit; 0 if none does."""
    return bisect_right(range(1, count + 1), limit_bytes, key=size_bytes)


# -- text ---------------------------------------------------------------------------------------------------------


def truncate_text(text: str, limit_bytes: int) -> str:
    """Return the longest beginning of `text` that has at most `limit_bytes` as UTF-8."""
    return text.encode()[: max(0, limit_bytes)].decode(errors="ignore")


def shorten(text: str, characters: int = _SHORT_CHARACTERS) -> str:
    """Return `text`, of a longer one the beginning with an ellipsis."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def excerpt(payload: bytes) -> str:
    """Return the beginning of a payload as text that JSON can hold, without credentials and queries."""
    document, looks_like_json = None, payload.lstrip()[:1] in (b"{", b"[", b'"')
    if looks_like_json and len(payload) <= _PARSED_BYTES:
        with suppress(ValueError):
            document = from_json(payload)
    if document is None:  # JSON that cannot be read may be cut off within a secret
        text = payload[:_READ_BYTES].decode(errors="replace")
        is_cut = looks_like_json or len(payload) > _READ_BYTES
        return truncate_text(redact_value(text, is_cut=is_cut), _EXCERPT_BYTES)
    text = ""
    for piece in redact_document(document):
        text += piece
        if len(text) >= _EXCERPT_BYTES:
            break
    return truncate_text(text, _EXCERPT_BYTES)


def _truncate_as_json(text: str, limit_bytes: int) -> str:
    """Return the longest beginning of `text` with at most `limit_bytes` in JSON, where a quote takes two bytes."""
    count = min(len(text), limit_bytes)
    return text[: most_that_fit(count, limit_bytes, lambda length: len(to_json(text[:length])) - len('""'))]


# -- a status, a segment -------------------------------------------------------------------------------------------


def truncate_status(status: "Status", limit_bytes: int | None = None) -> bytes:
    """Return the payload of a status, its text and if need be its metadata cut to the limit; None: no limit.

    A limit below what the other fields take is not kept.

    Raises:
        ValueError: the status cannot be serialised, as one from a ledger that was edited by hand.
    """
    payload = to_json(status)
    if limit_bytes is None or len(payload) <= limit_bytes:
        return payload
    return to_json(_shorter_status(status, limit_bytes))


def _shorter_status(status: "Status", limit_bytes: int) -> "Status":
    text = status["result_text"]
    shorter: Status = {**status, "result_truncated": True, "result_text": None if text is None else ""}
    room = limit_bytes - len(to_json(shorter))
    if room < 0:
        shorter["metadata"] = {}
        room = limit_bytes - len(to_json(shorter))
    if text and room > 0:
        shorter["result_text"] = _truncate_as_json(text, room)
    return shorter


def truncate_segment(segment: "JobSegment", limit_bytes: int | None = None) -> bytes:
    """Return the payload of a segment, without its words and then with the beginning of its text to keep the limit.

    A segment that is too large even without a text does not keep it. None: no limit.
    """
    payload = to_json(segment)
    if limit_bytes is None or len(payload) <= limit_bytes:
        return payload
    shorter = cast("JobSegment", {name: value for name, value in segment.items() if name != "words"})
    payload = to_json(shorter)
    if len(payload) > limit_bytes:
        text = segment["text"]

        def beginning(characters: int) -> bytes:
            return to_json({**shorter, "text": text[:characters]})

        payload = beginning(most_that_fit(len(text) - 1, limit_bytes, lambda length: len(beginning(length))))
    return payload


# -- pages of a response -------------------------------------------------------------------------------------------


def truncate_list(items: Iterable[Item], limit_bytes: int) -> list[Item]:
    """Return as many of the first items as have at most `limit_bytes` together."""
    page: list[Item] = []
    room = limit_bytes
    for item in items:
        room -= len(item.encode()) + len(",")
        if room < 0:
            break
        page.append(item)
    return page


def truncate_result(content: bytes, start: int, length: int, limit_bytes: int) -> str:
    """Return the text in `length` bytes of UTF-8 from `start` on; less, to end between characters or keep the limit.

    Args:
        content: the file.
        start: the first byte; not inside of a character.
        length: at least 4, the bytes of the longest character.
        limit_bytes: of the text in JSON, which writes a quote in two bytes and a control character in six.
    """
    end = min(start + length, len(content))
    while is_inside_character(content, end):
        end -= 1
    return _truncate_as_json(content[start:end].decode(), limit_bytes)


def is_inside_character(content: bytes, at: int) -> bool:
    """Whether a cut before byte `at` would split a character of UTF-8."""
    return at < len(content) and content[at] & _CONTINUATION_MASK == _CONTINUATION


# -- a response, a rejection ---------------------------------------------------------------------------------------


def truncate_response(payload: bytes, limit_bytes: int) -> bytes:
    """Return a response, an answer or a rejection in at most `limit_bytes`.

    What the producer can request in pieces gets shorter, and is marked: a page of a result, a page of jobs, the text
    of a status. Any other response becomes an error with advice. The transaction stays, unless it alone is too large.
    What cannot be cut, or not by enough, does not keep the limit.
    """
    if len(payload) <= limit_bytes:
        return payload
    response = json.loads(payload)  # unlike pydantic's, it reads all metadata that a request may have, one level deeper
    shorter = payload
    for candidate in _shorter_responses(response, len(payload), limit_bytes):
        shorter = encode(candidate)
        if len(shorter) <= limit_bytes:
            break
    return shorter


def _shorter_responses(response: Data, was_bytes: int, limit_bytes: int) -> Iterator[Data]:
    """Yield shorter responses, the best first."""
    if "payload_excerpt" in response:
        yield {**response, "payload_excerpt": ""}
    if "transaction" not in response:
        return
    data = response["data"]
    if "result_text" in data:
        room = limit_bytes - len(encode({**response, "data": 0})) + 1
        with suppress(ValueError):  # metadata nested as deep as a request may have are too deep to be measured
            yield {**response, "data": _shorter_status(cast("Status", data), room)}
    for name in _PAGES.keys() & data.keys():
        for candidate in (data, _without_metadata(data)):
            yield from _shorter_page(response, name, candidate, limit_bytes)
    error = response["error"] or (
        f"The command was executed, but its response has {was_bytes} bytes, and a packet of the broker has room for "
        f"{limit_bytes}: raise that limit (the broker's own, or broker.max_packet_bytes), or send a shorter "
        "transaction."
    )
    failure = {"status": "error", "data": {"consumer": data.get("consumer")}, "error": error}
    yield {**failure, "transaction": response["transaction"]}
    yield {**failure, "transaction": None}


def _shorter_page(response: Data, name: str, data: Data, limit_bytes: int) -> Iterator[Data]:
    """Yield the response with as much of one field of its data as has room, if any has."""
    page = _PAGES[name]
    kept = most_that_fit(
        len(data[name]) - 1, limit_bytes, lambda number: len(encode({**response, "data": page(data, number)}))
    )
    if kept:
        yield {**response, "data": page(data, kept)}


def _without_metadata(data: Data) -> Data:
    """Return a page of jobs without their metadata; anything else as it is."""
    return {**data, "jobs": [{**job, "metadata": {}} for job in data["jobs"]]} if "jobs" in data else data


def _result_page(data: Data, characters: int) -> Data:
    text = data["text"][:characters]
    return {**data, "text": text, "length": len(text.encode()), "more": True}


def _list_page(data: Data, jobs: int) -> Data:
    return {**data, "jobs": data["jobs"][:jobs], "next": data["jobs"][jobs - 1]["job_id"]}


def _rejections(data: Data, count: int) -> Data:
    return {**data, "rejected": data["rejected"][:count]}


_PAGES: Mapping[str, Callable[[Data, int], Data]] = {
    "text": _result_page,
    "jobs": _list_page,
    "rejected": _rejections,
}
"""How data are cut to so much of the field of that name."""
