"""Whole results of completed jobs, page by page from their consumer: a retained result may be cut to a packet."""

from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError

from cesar_mqtt.gateway.bus import Bus
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError

_PAGE_S = 10.0
"""The longest wait for one page; a consumer answers commands while it transcribes."""


def fetch_result(bus: Bus, job_id: str, result_format: str, *, consumer: str | None) -> bytes:
    """Return a result as the file that it is; waits, so not for the thread of the bus.

    Raises:
        NoAnswerError: the consumer is not online, or did not answer.
        RequestRefusedError: there is no such result any more, or the response is not the contract's.
    """
    result, more = bytearray(), True
    while more:
        fields = {"job_id": job_id, "format": result_format, "offset": len(result)}
        try:
            page = bus.command("result", fields, consumer=consumer, timeout_s=_PAGE_S).result(2 * _PAGE_S)
        except (FutureTimeoutError, CancelledError) as exc:
            raise NoAnswerError("The bus was closed.", "") from exc
        text, more = page.get("text"), page.get("more") is True
        if not isinstance(text, str) or (more and not text):
            raise RequestRefusedError("The consumer's response cannot be read.")
        result += text.encode(errors="replace")
    return bytes(result)
