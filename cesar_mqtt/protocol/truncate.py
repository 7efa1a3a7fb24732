"""What is said once and not kept, such as an answer, cut to what the broker takes in one message.

Pure; any thread may call it.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from cesar_mqtt.json_codec import encode
from cesar_mqtt.protocol.payloads import SegmentMessage, Status, fit

Data = dict[str, Any]


def truncate_response(payload: bytes, size_bytes: int) -> bytes:
    """Return an answer, or the report of a refusal, in at most so many bytes.

    What can be had in pieces gets shorter, and says so in its own fields: a piece of a result, a page of jobs, the text
    of a status. Any other answer becomes an error that says what to do. The transaction stays, unless it alone is too
    large. What cannot be cut, or not by enough, comes out larger than it should.
    """
    if len(payload) <= size_bytes:
        return payload
    said = json.loads(payload)  # unlike pydantic's, it reads whatever metadata we took, one level deeper
    made = payload
    for shorter in _shorter(said, len(payload), size_bytes):
        made = encode(shorter)
        if len(made) <= size_bytes:
            break
    return made


def truncate_segment(segment: SegmentMessage, size_bytes: int) -> bytes:
    """Return a segment in at most so many bytes, without its words and then with the beginning of its text if need be.

    A segment that has no room even without a text comes out larger.
    """
    payload = segment.encode()
    if len(payload) > size_bytes:
        payload = segment.model_copy(update={"words": None}).encode()
    if len(payload) > size_bytes:

        def beginning(characters: int) -> bytes:
            return segment.model_copy(update={"words": None, "text": segment.text[:characters]}).encode()

        payload = beginning(_most(len(segment.text), size_bytes, beginning))
    return payload


def _most(limit: int, size_bytes: int, make: Callable[[int], bytes]) -> int:
    """Return the greatest number below `limit` for which what is made, which grows with it, is not too large; or 0."""
    return bisect_right(range(1, limit), size_bytes, key=lambda number: len(make(number)))


def _shorter(said: Data, was_bytes: int, size_bytes: int) -> Iterator[Data]:
    """Yield what can be said instead, the best first."""
    if "payload_excerpt" in said:
        yield {**said, "payload_excerpt": ""}
    if "transaction" not in said:
        return
    data = said["data"]
    if "result_text" in data:
        room = size_bytes - len(encode({**said, "data": 0})) + 1
        with suppress(ValueError):  # metadata that are nested as deep as we take them are too deep to be read so
            yield {**said, "data": json.loads(fit(Status.model_validate_json(encode(data)), room))}
    for name in _CUTS.keys() & data.keys():
        for fuller in (data, _bare(data)):
            yield from _beginning(said, name, fuller, size_bytes)
    error = said["error"] or (
        f"It is done, but the answer has {was_bytes} bytes, and a packet of the broker's has room for {size_bytes}: "
        "raise that limit (the broker's own, or broker.max_packet_bytes), or send a shorter transaction."
    )
    failure = {"status": "error", "data": {"consumer": data.get("consumer")}, "error": error}
    yield {**failure, "transaction": said["transaction"]}
    yield {**failure, "transaction": None}


def _beginning(said: Data, name: str, data: Data, size_bytes: int) -> Iterator[Data]:
    """Yield the answer with as much of one field of its data as there is room for, if there is for any."""
    cut = _CUTS[name]
    kept = _most(len(data[name]), size_bytes, lambda number: encode({**said, "data": cut(data, number)}))
    if kept:
        yield {**said, "data": cut(data, kept)}


def _bare(data: Data) -> Data:
    """Return a page of jobs without their metadata; anything else as it is."""
    return {**data, "jobs": [{**job, "metadata": {}} for job in data["jobs"]]} if "jobs" in data else data


def _piece(data: Data, characters: int) -> Data:
    text = data["text"][:characters]
    return {**data, "text": text, "length": len(text.encode()), "more": True}


def _page(data: Data, jobs: int) -> Data:
    return {**data, "jobs": data["jobs"][:jobs], "next": data["jobs"][jobs - 1]["job_id"]}


_CUTS: Mapping[str, Callable[[Data, int], Data]] = {"text": _piece, "jobs": _page}
"""How data are cut to so much of the field of that name."""
