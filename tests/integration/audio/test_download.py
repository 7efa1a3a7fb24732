"""Downloads from a real server on loopback that misbehaves in every way it can."""

import base64
import contextlib
import email.utils
import errno
import hashlib
import itertools
import logging
import os
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import pytest

from cesar_mqtt.audio import pinned_http
from cesar_mqtt.audio.download import Downloader
from cesar_mqtt.config import AudioSettings
from cesar_mqtt.errors import Cancelled, ConfigError, ErrorCode, JobFailedError
from tests.conftest import PATIENCE_S, Certificates, find_free_port
from tests.integration.audio.misbehaving import (
    Answer,
    Exchange,
    MisbehavingServer,
    fails,
    gives,
    head,
    redirects,
    says,
)

BODY = bytes(range(256)) * 1000


class StartServer(Protocol):
    def __call__(
        self, *answers: Answer, tls: ssl.SSLContext | None = None, hasty: bool = False
    ) -> MisbehavingServer: ...


@pytest.fixture
def serve() -> Iterator[StartServer]:
    started: list[MisbehavingServer] = []

    def start(*answers: Answer, tls: ssl.SSLContext | None = None, hasty: bool = False) -> MisbehavingServer:
        started.append(MisbehavingServer(answers, tls, hasty=hasty))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    level = logging.getLogger("httpcore2").level
    yield
    logging.getLogger("httpcore2").setLevel(level)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert {thread.name for thread in set(threading.enumerate()) - before if thread.name == "resolve"} == set()


class Resolver:
    """Answers with what a test says, call by call (the last one again and again), and notes the calls."""

    def __init__(self, *answers: list[str] | Exception) -> None:
        self.calls: list[tuple[str, int]] = []
        self._answers = list(answers)

    def __call__(self, host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        self.calls.append((host, port))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in answer
        ]


LOOPBACK = Resolver(["127.0.0.1"])


def downloader(
    folder: Path,
    *hosts: str,
    getaddrinfo: Callable[..., Any] = LOOPBACK,
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> Downloader:
    hosts = hosts or ("127.0.0.1:*",)
    return Downloader(
        AudioSettings(allowed_hosts=hosts, **settings),
        folder,
        getaddrinfo=getaddrinfo,
        tls=tls,
        retry_delay_s=0.01,
    )


def never() -> bool:
    return False


def failure_of(work: Callable[[], object], folder: Path) -> JobFailedError:
    """The failure, after which nothing may be left in the folder."""
    with pytest.raises(JobFailedError) as error:
        work()
    assert list(folder.iterdir()) == []
    return error.value


# What goes well


def test_a_file_arrives_complete_and_readable_by_its_owner_only(tmp_path: Path, serve: StartServer) -> None:
    server = serve(gives(BODY))
    before = os.umask(0)
    try:
        path = downloader(tmp_path).fetch(server.url("/a%20b?token=x#t=1"), never).path
    finally:
        os.umask(before)
    assert path.read_bytes() == BODY
    assert path.parent == tmp_path
    assert path.name.isalnum()
    assert path.stat().st_mode & 0o777 == 0o600
    asked = server.requests[0].decode().splitlines()
    assert asked[0] == "GET /a%20b?token=x HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}" in asked
    assert "Accept-Encoding: identity" in asked
    assert not any(line.lower().startswith(("authorization", "cookie")) for line in asked)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(says(head() + BODY), id="ended by closing"),
        pytest.param(
            says(head(Transfer_Encoding="chunked") + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"), id="chunked"
        ),
        pytest.param(says(head("100 Continue") + head(Content_Length=len(BODY)) + BODY), id="after 100 Continue"),
        pytest.param(says(head(Content_Length=len(BODY)) + BODY + b"and more"), id="more than announced"),
        pytest.param(gives(BODY, Content_Encoding="identity"), id="identity"),
        pytest.param(
            lambda exchange: exchange.drip(iter([head(Content_Length=len(BODY)), BODY[:7], BODY[7:]]), 0.05), id="slow"
        ),
    ],
)
def test_a_body_arrives_however_its_end_is_marked(tmp_path: Path, serve: StartServer, answer: Answer) -> None:
    assert downloader(tmp_path).fetch(serve(answer).url(), never).path.read_bytes() == BODY


def test_an_empty_file_is_a_file(tmp_path: Path, serve: StartServer) -> None:
    assert downloader(tmp_path).fetch(serve(gives(b"")).url(), never).path.read_bytes() == b""


def test_several_downloads_go_on_at_once(tmp_path: Path, serve: StartServer) -> None:
    together = threading.Barrier(4)

    def answer(exchange: Exchange) -> None:
        together.wait(PATIENCE_S)
        exchange.send(head(Content_Length=len(BODY)) + BODY)

    server = serve(answer)
    fetcher = downloader(tmp_path)
    threads = [threading.Thread(target=fetcher.fetch, args=(server.url(), never)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [path.read_bytes() == BODY for path in tmp_path.iterdir()] == [True] * 4


# The allow-list


def test_a_wrong_entry_is_named_when_the_downloader_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^audio\.allowed_hosts: 'http://cam' cannot be used"):
        downloader(tmp_path, "http://cam")


def test_a_host_that_is_not_listed_is_neither_resolved_nor_connected_to(tmp_path: Path, serve: StartServer) -> None:
    server = serve(gives(BODY))
    resolver = Resolver(["127.0.0.1"])
    fetcher = downloader(tmp_path, "cam.test", "127.0.0.1:1", getaddrinfo=resolver)
    for url in (server.url(), server.url(host="cam.test"), server.url(host="other.test"), "http://2130706433/"):
        assert failure_of(lambda url=url: fetcher.fetch(url, never), tmp_path).code is ErrorCode.AUDIO_NOT_ALLOWED  # type: ignore[misc]
    assert (server.requests, resolver.calls) == ([], [])


def test_a_name_in_the_home_network_is_rejected_unless_its_address_is_listed(
    tmp_path: Path, serve: StartServer
) -> None:
    server = serve(gives(BODY))
    named = f"cam.test:{server.port}"
    failure = failure_of(lambda: downloader(tmp_path, named).fetch(server.url(host="cam.test"), never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_NOT_ALLOWED
    assert f"resolves to 127.0.0.1, which is not a public address: add '127.0.0.1:{server.port}'" in failure.message
    assert server.requests == []
    fetcher = downloader(tmp_path, named, "127.0.0.0/8:*")
    assert fetcher.fetch(server.url(host="CAM.test."), never).path.read_bytes() == BODY
    assert f"Host: cam.test:{server.port}".encode() in server.requests[0]


@pytest.mark.parametrize(
    "address",
    ["::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "169.254.169.254", "fe80::1", "0.0.0.0"],  # noqa: S104
)
def test_no_private_address_is_reached_through_a_name(tmp_path: Path, address: str) -> None:
    fetcher = downloader(tmp_path, "cam.test", getaddrinfo=Resolver([address]))
    failure = failure_of(lambda: fetcher.fetch("http://cam.test/", never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_NOT_ALLOWED


def test_of_several_addresses_only_the_allowed_ones_are_connected_to(tmp_path: Path, serve: StartServer) -> None:
    server = serve(gives(BODY))
    resolver = Resolver(["::1", "127.0.0.2", "127.0.0.1"])  # refused; allowed, where no server listens; allowed
    fetcher = downloader(tmp_path, "cam.test:*", "127.0.0.0/30:*", getaddrinfo=resolver)
    assert fetcher.fetch(server.url(host="cam.test"), never).path.read_bytes() == BODY


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(tmp_path: Path, serve: StartServer) -> None:
    """A name server may answer differently a moment later: one answer is asked for, checked and used."""
    server = serve(gives(BODY))
    resolver = Resolver(["127.0.0.1"], ["10.0.0.1"])
    fetcher = downloader(tmp_path, "cam.test:*", "127.0.0.1:*", getaddrinfo=resolver)
    assert fetcher.fetch(server.url(host="cam.test"), never).path.read_bytes() == BODY
    assert resolver.calls == [("cam.test", server.port)]


def test_each_try_checks_the_address_anew(tmp_path: Path, serve: StartServer) -> None:
    server = serve(fails("503 Busy"))
    resolver = Resolver(["127.0.0.1"], ["10.0.0.1"])
    fetcher = downloader(tmp_path, "cam.test:*", "127.0.0.1:*", getaddrinfo=resolver)
    failure = failure_of(lambda: fetcher.fetch(server.url(host="cam.test"), never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_NOT_ALLOWED
    assert len(server.requests) == 1


def test_proxies_and_netrc_of_the_environment_are_left_alone(
    tmp_path: Path, serve: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    (tmp_path / "netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{find_free_port()}")
    server = serve(gives(BODY))
    assert downloader(folder).fetch(server.url(), never).path.read_bytes() == BODY
    assert b"authorization" not in server.requests[0].lower()


# Redirects


def test_five_redirects_are_followed_and_a_sixth_is_not(tmp_path: Path, serve: StartServer) -> None:
    statuses = ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
    server = serve(*(redirects(f"/{i}", status) for i, status in enumerate(statuses)), gives(BODY))
    assert downloader(tmp_path).fetch(server.url(), never).path.read_bytes() == BODY
    assert [asked.split()[1] for asked in server.requests] == [b"/clip.wav", b"/0", b"/1", b"/2", b"/3", b"/4"]


def test_a_redirect_loop_ends_without_another_try(tmp_path: Path, serve: StartServer) -> None:
    server = serve(redirects("/again"))
    failure = failure_of(lambda: downloader(tmp_path).fetch(server.url(), never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "more than 5 redirects" in failure.message
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "location",
    [
        "http://other.test/",
        "http://cam.test:1/",
        "http://127.0.0.1:1/",
        "http://localhost/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://2130706433/",
        "file:///etc/passwd",
        "ftp://cam.test/clip.wav",
        "data:audio/wav;base64,AAAA",
    ],
)
def test_a_redirect_to_elsewhere_is_not_followed(tmp_path: Path, serve: StartServer, location: str) -> None:
    server = serve(redirects(location))
    hosts = (f"cam.test:{server.port}", f"127.0.0.1:{server.port}")
    failure = failure_of(lambda: downloader(tmp_path, *hosts).fetch(server.url(host="cam.test"), never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_NOT_ALLOWED
    assert failure.message.startswith("The server of the audio URL redirects, and that is not followed. ")
    assert len(server.requests) == 1


def test_the_listed_name_in_a_redirect_is_checked_by_address_as_well(tmp_path: Path, serve: StartServer) -> None:
    server = serve(gives(BODY))
    first = serve(redirects(f"http://nas.test:{server.port}/"))
    resolver = Resolver(["127.0.0.1"], ["127.0.0.2"])
    fetcher = downloader(tmp_path, "*.test:*", "127.0.0.1:*", getaddrinfo=resolver)
    failure = failure_of(lambda: fetcher.fetch(first.url(host="cam.test"), never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_NOT_ALLOWED
    assert (len(first.requests), server.requests) == (1, [])


def test_a_redirect_to_another_listed_server_goes_without_password_and_cookie(
    tmp_path: Path, serve: StartServer
) -> None:
    other = serve(gives(BODY))
    cookie = says(head("302 Found", Location="/next", Set_Cookie="id=1", Content_Length=0))
    first = serve(cookie, redirects(other.url()))
    path = downloader(tmp_path).fetch(first.url(userinfo="us%40er:p%3Aw@"), never).path
    assert path.read_bytes() == BODY
    basic = b"Authorization: Basic " + base64.b64encode(b"us@er:p:w")
    assert [basic in asked for asked in (*first.requests, *other.requests)] == [True, True, False]
    assert not any(b"cookie" in asked.lower() for asked in (*first.requests, *other.requests))


# TLS


def trusting(authority: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # the tests' authorities name no key usage
    return context


def showing(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.broker, certificates.broker_key)
    return context


def test_the_certificate_is_checked_by_name_while_the_address_is_what_was_checked(
    tmp_path: Path, serve: StartServer, certificates: Certificates
) -> None:
    server = serve(gives(BODY), tls=showing(certificates))
    resolver = Resolver(["127.0.0.1"])
    hosts = ("localhost:*", "127.0.0.1:*")
    fetcher = downloader(tmp_path, *hosts, getaddrinfo=resolver, tls=trusting(certificates.ca))
    assert fetcher.fetch(server.url(host="LOCALHOST"), never).path.read_bytes() == BODY
    assert server.names == ["localhost"]
    assert f"Host: localhost:{server.port}".encode() in server.requests[0]
    assert fetcher.fetch(server.url(), never).path.read_bytes() == BODY
    assert resolver.calls == [("localhost", server.port)]


@pytest.mark.parametrize(("host", "authority"), [("cam.test", "ca"), ("localhost", "other_ca")])
def test_a_wrong_certificate_ends_it_at_once(
    tmp_path: Path, serve: StartServer, certificates: Certificates, host: str, authority: str
) -> None:
    server = serve(gives(BODY), tls=showing(certificates))
    fetcher = downloader(tmp_path, f"{host}:*", "127.0.0.1:*", tls=trusting(getattr(certificates, authority)))
    failure = failure_of(lambda: fetcher.fetch(server.url(host=host), never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "cannot be trusted" in failure.message
    assert (server.requests, len(server.names)) == ([], 1)


def test_a_server_that_speaks_no_tls_is_named(tmp_path: Path, serve: StartServer) -> None:
    server = serve(says(b"220 mail.test ESMTP\r\n"), hasty=True)
    url = server.url().replace("http:", "https:")
    failure = failure_of(lambda: downloader(tmp_path).fetch(url, never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "cannot be reached with TLS (WRONG_VERSION_NUMBER)" in failure.message


def test_http_may_lead_on_to_https_but_not_back(tmp_path: Path, serve: StartServer, certificates: Certificates) -> None:
    plain = serve(gives(b"plain"))
    good = serve(gives(BODY), tls=showing(certificates))
    bad = serve(redirects(plain.url()), tls=showing(certificates))
    fetcher = downloader(tmp_path, tls=trusting(certificates.ca))
    path = fetcher.fetch(serve(redirects(good.url())).url(), never).path
    assert path.read_bytes() == BODY
    path.unlink()
    failure = failure_of(lambda: fetcher.fetch(bad.url(), never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_NOT_ALLOWED
    assert "from https to http" in failure.message
    assert plain.requests == []


# Sizes


def endless() -> Iterator[bytes]:
    return itertools.repeat(b"\0" * 65536)


def test_a_file_that_is_announced_as_too_large_is_not_begun(tmp_path: Path, serve: StartServer) -> None:
    def announces(exchange: Exchange) -> None:
        exchange.send(head(Content_Length=1001))
        exchange.hang()

    server = serve(announces)
    failure = failure_of(lambda: downloader(tmp_path, max_bytes=1000).fetch(server.url(), never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_TOO_LARGE
    assert "larger than `audio.max_bytes`, 1000" in failure.message
    assert len(server.requests) == 1


@pytest.mark.parametrize("begin", [head(), head(Transfer_Encoding="chunked") + b"fffffffff\r\n"])
def test_an_endless_body_ends_at_the_limit(tmp_path: Path, serve: StartServer, begin: bytes) -> None:
    server = serve(lambda exchange: exchange.drip(itertools.chain([begin], endless())))
    failure = failure_of(lambda: downloader(tmp_path, max_bytes=1_000_000).fetch(server.url(), never), tmp_path)
    assert failure.code is ErrorCode.AUDIO_TOO_LARGE
    server.left.get(timeout=PATIENCE_S)


def test_a_file_of_exactly_the_limit_is_taken(tmp_path: Path, serve: StartServer) -> None:
    fetcher = downloader(tmp_path, max_bytes=len(BODY))
    assert fetcher.fetch(serve(gives(BODY)).url(), never).path.stat().st_size == len(BODY)
    assert fetcher.fetch(serve(says(head() + BODY)).url(), never).path.stat().st_size == len(BODY)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd"])
def test_a_compressed_answer_is_not_unpacked(tmp_path: Path, serve: StartServer, encoding: str) -> None:
    server = serve(gives(zlib.compress(b"\0" * 10_000_000), Content_Encoding=encoding))
    failure = failure_of(lambda: downloader(tmp_path).fetch(server.url(), never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "compressed the file although asked not to" in failure.message


# Failures that may pass

BROKEN: dict[str, Answer] = {
    "shorter than announced": says(head(Content_Length=len(BODY) + 1) + BODY),
    "chunked and cut": says(head(Transfer_Encoding="chunked") + b"fff\r\nabc"),
    "chunked garbage": says(head(Transfer_Encoding="chunked") + b"nonsense\r\n\r\n"),
    "closed without an answer": says(b""),
    "closed within the head": says(b"HTTP/1.1 200 OK\r\nContent-"),
    "not HTTP": says(b"220 mail.test ESMTP\r\n"),
    "two lengths": says(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    "a negative length": says(head(Content_Length=-1)),
    "a length of many digits": says(head(Content_Length="9" * 5000)),
    "a length in words": says(head(Content_Length="many")),
    "a flood of headers": lambda exchange: exchange.drip(
        itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"X-Flood: yes\r\n" * 1000))
    ),
    "one header without an end": lambda exchange: exchange.drip(
        itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"x" * 65536))
    ),
    "500": fails("500 Oops"),
    "503": fails("503 Busy"),
    "599": fails("599 Odd"),
    "429": fails("429 Slow Down"),
}


def resets(exchange: Exchange) -> None:
    exchange.reset()


@pytest.mark.parametrize("answer", [*BROKEN.values(), resets], ids=[*BROKEN, "reset"])
def test_a_temporary_failure_is_retried(tmp_path: Path, serve: StartServer, answer: Answer) -> None:
    server = serve(answer, gives(BODY))
    assert downloader(tmp_path).fetch(server.url(), never).path.read_bytes() == BODY
    assert len(server.requests) == 2


@pytest.mark.parametrize("answer", [*BROKEN.values(), resets], ids=[*BROKEN, "reset"])
def test_a_lasting_failure_is_reported_after_the_retries(
    tmp_path: Path, serve: StartServer, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(answer)
    url = server.url("/clip.wav?token=hidden", userinfo="user:secret@")
    caplog.set_level(logging.DEBUG)
    failure = failure_of(lambda: downloader(tmp_path, download_retries=1).fetch(url, never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert f"127.0.0.1:{server.port}" in failure.message
    assert len(server.requests) == 2
    for secret in ("hidden", "secret", "user:"):
        assert secret not in failure.message
        assert secret not in caplog.text
    assert "Next try in" in caplog.text


def test_nothing_of_a_failed_try_is_left_in_the_file(tmp_path: Path, serve: StartServer) -> None:
    server = serve(BROKEN["shorter than announced"], gives(b"short"))
    fetched = downloader(tmp_path).fetch(server.url(), never)
    assert fetched.path.read_bytes() == b"short"
    assert fetched.digest == hashlib.sha256(b"short").hexdigest(), "nor in what tells it apart"


def test_the_location_of_a_redirect_is_not_logged(
    tmp_path: Path, serve: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(redirects("/clip.wav?token=hidden"), gives(BODY))
    downloader(tmp_path).fetch(server.url(userinfo="user:secret@"), never)
    assert "hidden" not in caplog.text
    assert "secret" not in caplog.text


def test_a_refused_connection_is_reported_after_the_retries(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{find_free_port()}/"
    failure = failure_of(lambda: downloader(tmp_path).fetch(url, never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert os.strerror(errno.ECONNREFUSED) in failure.message


@pytest.mark.parametrize(
    "answer", [socket.gaierror(socket.EAI_NONAME, "unknown"), UnicodeError("label too long"), []], ids=repr
)
def test_a_name_that_does_not_resolve_is_tried_again_and_named(tmp_path: Path, answer: Any) -> None:
    resolver = Resolver(answer)
    fetcher = downloader(tmp_path, "cam.test", getaddrinfo=resolver)
    failure = failure_of(lambda: fetcher.fetch("http://cam.test/", never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "'cam.test'" in failure.message
    assert len(resolver.calls) == 3


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("400 Bad", ErrorCode.DOWNLOAD_FAILED),
        ("401 Who", ErrorCode.DOWNLOAD_FAILED),
        ("403 No", ErrorCode.DOWNLOAD_FAILED),
        ("404 Not Found", ErrorCode.AUDIO_NOT_FOUND),
        ("410 Gone", ErrorCode.AUDIO_NOT_FOUND),
        ("204 Nothing", ErrorCode.DOWNLOAD_FAILED),
        ("206 Some", ErrorCode.DOWNLOAD_FAILED),
        ("304 Same", ErrorCode.DOWNLOAD_FAILED),
        ("302 Nowhere", ErrorCode.DOWNLOAD_FAILED),
    ],
)
def test_a_permanent_failure_is_not_retried(tmp_path: Path, serve: StartServer, status: str, code: ErrorCode) -> None:
    server = serve(says(head(status)))
    url = server.url("/clip.wav?token=hidden", userinfo="user:secret@")
    failure = failure_of(lambda: downloader(tmp_path).fetch(url, never), tmp_path)
    assert failure.code is code
    assert f"(HTTP status {status[:3]}, http://127.0.0.1:{server.port}/clip.wav)" in failure.message
    assert "hidden" not in failure.message
    assert "secret" not in failure.message
    assert len(server.requests) == 1


def test_retry_after_is_waited_for(tmp_path: Path, serve: StartServer) -> None:
    server = serve(fails("429 Slow", Retry_After="1"), gives(BODY))
    before = time.monotonic()
    assert downloader(tmp_path).fetch(server.url(), never).path.read_bytes() == BODY
    assert time.monotonic() - before >= 1


@pytest.mark.parametrize(
    "value",
    ["3600", "9" * 400, email.utils.formatdate(time.time() + 3600), "Fri, 31 Dec 9999 23:59:59 GMT"],
    ids=["an hour", "many digits", "in an hour", "the last date"],
)
def test_a_retry_after_that_is_too_far_off_ends_it(tmp_path: Path, serve: StartServer, value: str) -> None:
    server = serve(fails("503 Busy", Retry_After=value), gives(BODY))
    failure = failure_of(lambda: downloader(tmp_path).fetch(server.url(), never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "asks to wait" in failure.message
    assert len(server.requests) == 1


def test_a_retry_after_beyond_the_time_that_is_left_ends_it(tmp_path: Path, serve: StartServer) -> None:
    server = serve(fails("503 Busy", Retry_After="50"), gives(BODY))
    fetcher = downloader(tmp_path, download_timeout=40.0)
    assert "asks to wait 50 s" in failure_of(lambda: fetcher.fetch(server.url(), never), tmp_path).message


@pytest.mark.parametrize(
    "value", ["soon", "-5", "", "²", "Thu, 01 Jan 1970 00:00:00 GMT", "Mon, 01 Jan 0001 00:00:00 -0000"]
)
def test_an_invalid_retry_after_is_ignored(tmp_path: Path, serve: StartServer, value: str) -> None:
    server = serve(fails("503 Busy", Retry_After=value), gives(BODY))
    assert downloader(tmp_path).fetch(server.url(), never).path.read_bytes() == BODY


def test_a_full_disk_is_reported_and_not_retried(
    tmp_path: Path, serve: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(gives(BODY))
    fdopen = os.fdopen

    class Full:
        def __init__(self, *arguments: Any) -> None:
            self._file = fdopen(*arguments)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdopen", Full)
    failure = failure_of(lambda: downloader(tmp_path).fetch(server.url(), never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "No space left on device): make room" in failure.message
    assert len(server.requests) == 1


# Time


def falls_silent(exchange: Exchange) -> None:
    exchange.send(head(Content_Length=10) + b"abc")
    exchange.hang()


SLOW: dict[str, Answer] = {
    "no answer": lambda exchange: exchange.hang(),
    "slow head": lambda exchange: exchange.drip(itertools.repeat(b"H"), 0.05),
    "a byte at a time": lambda exchange: exchange.drip(
        itertools.chain([head(Content_Length=10**6)], itertools.repeat(b"x")), 0.05
    ),
    "a silent body": falls_silent,
    "endless 100 Continue": lambda exchange: exchange.drip(itertools.repeat(head("100 Continue") * 100)),
    "asks to wait": fails("503 Busy", Retry_After="30"),
}


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_a_download_that_takes_too_long_ends(tmp_path: Path, serve: StartServer, answer: Answer) -> None:
    server = serve(answer)
    failure = failure_of(lambda: downloader(tmp_path, download_timeout=3.0).fetch(server.url(), never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_a_cancel_ends_a_download_whatever_the_server_does(tmp_path: Path, serve: StartServer, answer: Answer) -> None:
    server = serve(answer)
    looked = itertools.count()

    def should_stop() -> bool:
        return server.reached.is_set() and next(looked) > 3

    with pytest.raises(Cancelled):
        downloader(tmp_path).fetch(server.url(), should_stop)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_is_retried(tmp_path: Path, serve: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_http, "_READ_S", 2.0)
    server = serve(lambda exchange: exchange.hang(), gives(BODY))
    assert downloader(tmp_path).fetch(server.url(), never).path.read_bytes() == BODY
    server.left.get(timeout=PATIENCE_S)


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A port on which no server accepts, and no further connection comes about."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.settimeout(0.0)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_connection_that_does_not_come_about_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_http, "_CONNECT_S", 0.2)
    with full_backlog() as port:
        fetcher = downloader(tmp_path, download_retries=0)
        failure = failure_of(lambda: fetcher.fetch(f"http://127.0.0.1:{port}/", never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "no answer within" in failure.message


def test_a_tls_handshake_without_an_answer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_http, "_CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fetcher = downloader(tmp_path, download_retries=0)
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        failure = failure_of(lambda: fetcher.fetch(url, never), tmp_path)
    assert failure.code is ErrorCode.DOWNLOAD_FAILED
    assert "sent nothing" in failure.message


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_server_that_pauses_within_a_response_loses_nothing(
    tmp_path: Path, serve: StartServer, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, *, encrypted: bool
) -> None:
    """A read that timed out after one step is repeated, also over TLS."""
    monkeypatch.setattr(pinned_http, "_STEP_S", 0.01)
    whole = head(Content_Length=len(BODY)) + BODY
    parts = [whole[:7], whole[7:100], whole[100:100_000], whole[100_000:]]
    server = serve(lambda exchange: exchange.drip(iter(parts), 0.1), tls=showing(certificates) if encrypted else None)
    fetcher = downloader(tmp_path, tls=trusting(certificates.ca))
    assert fetcher.fetch(server.url(), never).path.read_bytes() == BODY


@pytest.mark.parametrize("stop", [True, False])
def test_a_resolver_that_does_not_answer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stop: bool) -> None:
    monkeypatch.setattr(pinned_http, "_CONNECT_S", 60 if stop else 0.2)
    looked, done = itertools.count(), threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[tuple[Any, ...]]:
        done.wait(PATIENCE_S)
        return []

    fetcher = downloader(tmp_path, "cam.test", getaddrinfo=getaddrinfo, download_retries=0)
    with pytest.raises(Cancelled if stop else JobFailedError):
        fetcher.fetch("http://cam.test/", lambda: stop and next(looked) > 3)
    done.set()
    for thread in threading.enumerate():
        if thread.name == "resolve":
            thread.join(PATIENCE_S)


def test_a_download_that_is_not_wanted_any_more_is_not_begun(tmp_path: Path, serve: StartServer) -> None:
    server = serve(gives(BODY))
    with pytest.raises(Cancelled):
        downloader(tmp_path).fetch(server.url(), lambda: True)
    assert server.requests == []
