"""The HTTP API on the real application, with a bus of which only the answers are there."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
from starlette.routing import Route

from cesar_mqtt.errors import SpoolFullError
from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.gateway.web import api
from cesar_mqtt.gateway.web.openapi import openapi_document
from cesar_mqtt.gateway.web.problems import ProblemError
from cesar_mqtt.gateway.web.upload_store import UploadStore
from cesar_mqtt.mqtt.messages import ConnectionInfo
from tests.unit.gateway.web.site import Site, status

WAV = b"RIFF....WAVE"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A page in a process of its own: uploads become messages."""
    site = Site(tmp_path)
    site.online()
    return site


@pytest.fixture
def serving(tmp_path: Path) -> Site:
    """The page of a consumer: uploads become files."""
    site = Site(tmp_path, stores=True)
    site.online()
    return site


def upload(site: Site, content: bytes = WAV, **fields: str) -> Any:
    return site.browser.post("/api/jobs", files={"file": ("note.wav", content)}, data=fields)


def problem(response: Any, http_status: int) -> Mapping[str, Any]:
    """The problem details of a response with this status."""
    assert response.status_code == http_status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    jsonschema.validate(body, openapi_document()["components"]["schemas"]["Problem"])
    assert body["title"] == HTTPStatus(http_status).phrase
    return body


# -- submitting --------------------------------------------------------------------------------------------------------


def test_an_upload_becomes_a_message_with_the_fields_of_the_form(site: Site) -> None:
    response = upload(
        site, job_id="note-1", language="German", formats="srt,json", priority="3", word_timestamps="true", stream=""
    )
    assert response.status_code == 201
    assert response.json()["status"] == "queued"
    assert response.url.join(response.headers["Location"]).path == "/api/jobs/note-1"
    (item,) = site.bus.submitted
    assert (item.job_id, item.audio, item.name) == ("note-1", WAV, "note.wav")
    assert item.options == {"language": "de", "formats": ["srt", "json"], "priority": 3, "word_timestamps": True}
    assert list(site.folder.iterdir()) == []


def test_inside_of_a_consumer_it_becomes_a_file_that_the_request_names(serving: Site) -> None:
    assert upload(serving, job_id="note-1", metadata='{"room": "hall"}').status_code == 201
    assert upload(serving, job_id="note-1", metadata='{"room": "hall"}').status_code == 201
    item, again = serving.bus.submitted
    assert item == again
    assert item.audio is None
    assert item.options == {"metadata": {"room": "hall"}}
    assert (serving.folder / item.path).read_bytes() == WAV
    assert [path.name for path in serving.folder.iterdir()] == [item.path]


@pytest.mark.parametrize(("diarize", "value"), [("true", True), ("false", False), ("channels", "channels")])
def test_speakers_are_asked_for_in_the_form(site: Site, diarize: str, value: bool | str) -> None:  # noqa: FBT001
    site.online()
    assert upload(site, diarize=diarize, min_speakers="2", max_speakers="3").status_code == 201
    (item,) = site.bus.submitted
    assert item.options == {"diarize": value, "min_speakers": 2, "max_speakers": 3}


def test_uploads_count_towards_the_room_until_no_job_needs_them(tmp_path: Path) -> None:
    limit, elsewhere = 3000, [0]

    def check_room(size_bytes: int) -> None:
        if elsewhere[0] + page.stored_bytes + size_bytes > limit:
            raise SpoolFullError("Uploaded audio takes all (queue.max_spool_bytes).", needed_bytes=size_bytes)

    page = Site(tmp_path, stores=True, check_room=check_room)
    page.online()
    assert upload(page, bytes(1500), job_id="a").status_code == 201
    full = problem(upload(page, bytes(1501), job_id="b"), 507)
    assert (full["code"], "queue.max_spool_bytes" in full["detail"]) == ("storage_full", True)
    assert [item.job_id for item in page.bus.submitted] == ["a"]
    assert len(list(page.folder.iterdir())) == 1
    elsewhere[0] = 1000  # the spool
    assert problem(upload(page, bytes(700), job_id="c"), 507)["code"] == "storage_full"
    page.ended.add("a")  # it may be retried; and its 1500 bytes are not enough
    assert problem(upload(page, bytes(2300), job_id="c"), 507)["code"] == "storage_full"
    assert page.stored_bytes == 1500
    assert upload(page, bytes(1600), job_id="c").status_code == 201
    assert [path.suffix for path in page.folder.iterdir()] == [".c"]
    assert page.stored_bytes == 1600
    elsewhere[0] = 0
    page.needed["c"] = False
    assert page.store is not None
    assert page.store.sweep() == 1
    assert (page.stored_bytes, upload(page, bytes(2500), job_id="d").status_code) == (0, 201)
    assert page.stored_bytes == 2500
    assert UploadStore(page.folder, is_needed=lambda _: True).used_bytes == 2500


def test_what_stands_around_the_parts_of_a_form_is_bounded(site: Site) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--x--\r\n'
    head = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": "100"}
    response = site.browser.post("/api/jobs", content=form + bytes(11 << 20), headers=head)
    assert problem(response, 413)["code"] == "payload_too_large"
    assert list(site.folder.iterdir()) == []


@pytest.mark.parametrize("boundary", ["x" * 300, "x" * 10_000])
def test_a_boundary_that_is_too_long_is_an_error_of_the_client(site: Site, boundary: str) -> None:
    head = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    response = site.browser.post("/api/jobs", content=b"--x", headers=head)
    assert problem(response, 400)["code"] == "malformed_form"


def test_the_head_of_an_event_stream_is_not_waited_for(site: Site) -> None:
    head = site.browser.head("/api/events")
    assert (head.status_code, head.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
    assert "cesar_web_event_streams 0" in site.browser.get("/metrics").text


def test_event_streams_are_bounded_even_where_all_clients_come_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_MOST_STREAMS", 3)

    async def come_at_once() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=site.app.asgi)) as http:
            asked = [asyncio.create_task(http.get("http://127.0.0.1:8188/api/events")) for _ in range(8)]
            refused, streams = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            while len(refused) < 5:
                refused, streams = await asyncio.wait(asked, timeout=0.1)
            assert "cesar_web_event_streams 3" in (await http.get("http://127.0.0.1:8188/metrics")).text
            for each in streams:
                each.cancel()
            await asyncio.wait(streams)
            assert "cesar_web_event_streams 0" in (await http.get("http://127.0.0.1:8188/metrics")).text
            return [each.result() for each in refused]

    for response in asyncio.run(asyncio.wait_for(come_at_once(), 60)):
        assert problem(response, 503)["code"] == "too_many_streams"
        assert (response.headers["Retry-After"], response.headers["Connection"]) == ("5", "close")


def test_without_an_id_each_upload_is_a_job_of_its_own(site: Site) -> None:
    assert upload(site).json()["job_id"] != upload(site).json()["job_id"]


def test_a_request_that_names_its_audio_is_published_as_it_is(site: Site) -> None:
    for source in ({"audio_path": "a.wav"}, {"audio_url": "https://example.org/a.wav"}):
        assert site.browser.post("/api/jobs", json={"job_id": "j", **source, "beam_size": 2}).status_code == 201
    by_path, by_url = site.bus.submitted
    assert (by_path.path, by_path.options) == ("a.wav", {"beam_size": 2})
    assert (by_url.path, by_url.options) == ("", {"audio_url": "https://example.org/a.wav", "beam_size": 2})


def test_while_every_consumer_is_away_the_broker_keeps_the_request(site: Site) -> None:
    site.take("cesar/consumer/cesar/state", {"state": "offline"})
    site.bus.on_submit = lambda _item: None
    response = upload(site, job_id="later")
    assert response.status_code == 202
    assert response.json() == {"job_id": "later", "status": None}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"langage": "de"}, "langage"),
        ({"language": "klingon"}, "language"),
        ({"priority": "10"}, "priority"),
        ({"formats": "docx"}, "formats"),
        ({"job_id": "../etc"}, "no job id"),
        ({"job_id": "current"}, "current"),
        ({"audio_path": "/etc/passwd"}, "audio_path"),
        ({"metadata": "[]"}, "metadata"),
        ({"metadata": json.dumps({"x": "y" * 5000})}, "metadata"),
        ({"file": "text"}, "file"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_published(site: Site, fields: dict[str, str], named: str) -> None:
    assert (
        named in problem(site.browser.post("/api/jobs", files={"file": ("note.wav", WAV)}, data=fields), 422)["detail"]
    )
    assert site.bus.submitted == []
    assert list(site.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("reason", "http_status"),
    [
        ("job_id_conflict", 409),
        ("queue_full", 429),
        ("storage_full", 507),
        ("payload_too_large", 413),
        ("invalid_request", 422),
    ],
)
def test_a_rejection_by_the_consumer_is_the_response(site: Site, reason: str, http_status: int) -> None:
    def reject(item: Submission) -> None:
        site.take("cesar/rejected", {"reason": reason, "detail": "Why it is not accepted.", "job_id": item.job_id})

    site.bus.on_submit = reject
    body = problem(upload(site), http_status)
    assert (body["code"], body["detail"]) == (reason, "Why it is not accepted.")


def test_a_broker_that_is_away_is_named(site: Site) -> None:
    def refuse(_item: Submission) -> None:
        raise ProblemError(503, "There is no connection to the broker: Connection refused.", "broker_unreachable")

    site.bus.on_submit = refuse
    assert problem(upload(site), 503)["code"] == "broker_unreachable"
    assert list(site.folder.iterdir()) == []


@pytest.mark.parametrize("stores", [True, False])
def test_a_recording_over_the_limit_is_rejected_with_what_to_do(tmp_path: Path, stores: bool) -> None:  # noqa: FBT001
    site = Site(tmp_path, stores=stores, most=1000)
    site.online()
    assert upload(site, b"x" * 1000).status_code == 201
    (*_, kept) = site.bus.submitted
    for size in (1001, 3_000_000):
        detail = problem(upload(site, b"x" * size), 413)["detail"]
        assert "1,000 bytes" in detail
        assert ("serve --web" in detail) is not stores
    assert len(site.bus.submitted) == 1
    assert [path.name for path in site.folder.iterdir()] == ([kept.path] if stores else [])


def test_alone_the_brokers_and_the_consumers_limits_count(site: Site) -> None:
    site.bus.connection = ConnectionInfo(session_present=False, protocol="5", max_packet_bytes=700_000, number=1)
    assert site.browser.get("/api/about").json()["max_upload_bytes"] == 400_000
    site.bus.connection = ConnectionInfo(session_present=False, protocol="3.1.1", max_packet_bytes=700_000, number=1)
    assert site.browser.get("/api/about").json()["max_upload_bytes"] == 300_000  # base64 is a third larger
    site.online(limits={"max_payload_bytes": 2000})
    assert site.browser.get("/api/about").json()["max_upload_bytes"] == 2000


FORM = "multipart/form-data; boundary=x"


def part(name: str, content: bytes = b"b", filename: str = "") -> bytes:
    """A part of a form with the boundary `x`."""
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return f"--x\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


@pytest.mark.parametrize(
    ("kind", "body", "http_status"),
    [
        (FORM, b"", 400),
        (FORM, part("file", b"half", "a").rstrip(), 400),
        (FORM, b"garbage", 400),
        (FORM, b"--x\r\n" + b"H: " + b"v" * 20_000 + b"\r\n\r\n\r\n--x--", 400),
        (FORM, part("language", b"de") * 300 + b"--x--", 400),
        (FORM, part("initial_prompt", b"y" * 1_100_000) + b"--x--", 413),
        (FORM, part("file", filename="a") * 2 + b"--x--", 400),
        (FORM, part("language", b"de") + b"--x--", 422),
        ("multipart/form-data", b"", 415),
        ("text/plain", b"a.wav", 415),
        ("", b"", 415),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 422),
        ("application/json", b'{"audio_path": NaN}', 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b'{"audio_path": "a", "x": "' + b"y" * 400_000 + b'"}', 413),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_damaged_request_is_rejected_and_leaves_nothing(site: Site, kind: str, body: bytes, http_status: int) -> None:
    response = site.browser.post("/api/jobs", content=body, headers={"Content-Type": kind})
    problem(response, http_status)
    assert list(site.folder.iterdir()) == []
    assert site.bus.submitted == []
    assert upload(site).status_code == 201


def test_an_empty_file_is_no_recording(site: Site) -> None:
    assert problem(upload(site, b""), 422)["code"] == "audio_empty"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("C:\\fakepath\\note.wav", "note.wav"),
        ("../../etc/passwd", "passwd"),
        ("gpj\u202egpj.exe", "gpj_gpj.exe"),
        ("a\u0000b\nc", "a_b_c"),
        ("x" * 500, "x" * 200),
        ("<script>", "<script>"),
    ],
)
def test_file_names_are_cut_to_their_last_part_without_control_characters(site: Site, sent: str, kept: str) -> None:
    body = part("file", b"abc", sent) + b"--x--"
    response = site.browser.post("/api/jobs", content=body, headers={"Content-Type": FORM})
    if "\n" in sent:
        assert response.status_code in {201, 400}
    else:
        assert site.bus.submitted[0].name == kept


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_in_pages_and_searched(site: Site) -> None:
    for number in range(5):
        site.take(f"cesar/status/job-{number}", status(f"job-{number}", "completed", result_text=f"text {number}"))
    first = site.browser.get("/api/jobs?limit=3").json()
    rest = site.browser.get(f"/api/jobs?limit=3&after={first['next']}").json()
    assert (len(first["jobs"]), len(rest["jobs"]), rest["next"], rest["total"]) == (3, 2, None, 5)
    assert len({job["job_id"] for job in first["jobs"] + rest["jobs"]}) == 5
    (found,) = site.browser.get("/api/jobs?q=TEXT 3").json()["jobs"]
    assert (found["job_id"], found["passage"]) == ("job-3", "text 3")
    assert "result_text" not in found


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=x", "limit=99999", "limit=\u0661", "status=nonsense"])
def test_a_wrong_query_is_named(site: Site, query: str) -> None:
    assert problem(site.browser.get(f"/api/jobs?{query}"), 422)["detail"].startswith(query.partition("=")[0])


def test_one_job_is_returned_whole(site: Site) -> None:
    document = status("a", "completed", result_text="Whole text.")
    site.take("cesar/status/a", document)
    assert site.browser.get("/api/jobs/a").json() == document


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/result.txt")]
)
def test_a_job_that_is_not_there_is_not_found(site: Site, method: str, path: str) -> None:
    assert problem(site.browser.request(method, f"/api/jobs/unknown{path}"), 404)["code"] == "not_found"
    assert site.bus.asked == []


@pytest.mark.parametrize(
    ("method", "path", "command"),
    [("DELETE", "", "delete"), ("POST", "/cancel", "cancel"), ("POST", "/retry", "retry")],
)
def test_a_change_is_asked_of_the_consumer_that_has_the_job(site: Site, method: str, path: str, command: str) -> None:
    site.take("cesar/status/a", status("a", consumer="kitchen"))
    assert problem(site.browser.request(method, f"/api/jobs/a{path}"), 409)["detail"] == "It is not possible."
    site.bus.answers[command] = lambda fields: {**fields, "status": "cancelled", "consumer": "kitchen"}
    assert site.browser.request(method, f"/api/jobs/a{path}").json()["job_id"] == "a"
    assert site.bus.asked == [(command, {"job_id": "a"}, "kitchen")] * 2


def test_a_result_is_put_together_from_its_pages(site: Site) -> None:
    site.take("cesar/status/a", status("a", "completed"))
    whole = "Zeile für Zeile\n" * 3

    def page(fields: Mapping[str, Any]) -> dict[str, Any]:
        part = whole.encode()[fields["offset"] : fields["offset"] + 17]
        return {"text": part.decode(), "length": len(part), "more": fields["offset"] + 17 < len(whole.encode())}

    site.bus.answers["result"] = page
    response = site.browser.get("/api/jobs/a/result.srt")
    assert response.text == whole
    assert response.headers["Content-Disposition"] == 'attachment; filename="a.srt"'
    assert response.headers["Content-Type"].startswith("application/x-subrip")


def test_while_the_consumer_is_away_the_text_is_there_all_the_same(site: Site) -> None:
    site.take("cesar/status/a", status("a", "completed"))
    site.take("cesar/status/b", status("b", "processing"))
    site.take("cesar/consumer/cesar/state", {"state": "offline"})
    assert site.browser.get("/api/jobs/a/result.txt").text == "Hello there.\n"
    assert problem(site.browser.get("/api/jobs/a/result.srt"), 503)["code"] == "consumer_offline"
    assert problem(site.browser.get("/api/jobs/b/result.txt"), 409)["code"] == "not_completed"
    assert problem(site.browser.get("/api/jobs/a/result.exe"), 404)["code"] == "not_found"


# -- consumers, rejections, the rest -----------------------------------------------------------------------------------


def test_consumers_are_listed_paused_and_resumed(site: Site) -> None:
    site.take("cesar/consumer/cesar/queue", {"activity": "idle", "queued": 3, "paused": False})
    (consumer,) = site.browser.get("/api/consumers").json()["consumers"]
    assert (consumer["name"], consumer["online"], consumer["queue"]["queued"]) == ("cesar", True, 3)
    for command, paused in (("pause", True), ("resume", False)):
        site.bus.answers[command] = lambda _fields, paused=paused: {"paused": paused, "consumer": "cesar"}  # type: ignore[misc]
        assert site.browser.post(f"/api/consumers/cesar/{command}").json()["paused"] is paused
    problem(site.browser.post("/api/consumers/unknown/pause"), 404)


def test_rejections_are_listed_the_newest_first(site: Site) -> None:
    for number in range(150):
        site.take("cesar/rejected", {"reason": "queue_full", "detail": f"number {number}"})
    listed = site.browser.get("/api/rejected").json()["rejected"]
    assert len(listed) == 100
    assert listed[0]["detail"] == "number 149"
    assert len(site.browser.get("/api/rejected?limit=2").json()["rejected"]) == 2


def test_health_says_whether_broker_and_consumer_can_be_reached(site: Site) -> None:
    assert site.browser.get("/healthz").status_code == 503
    site.board.set_broker(connected=True)
    assert site.browser.get("/healthz").json() == {"status": "ok", "broker": True, "consumers_online": 1}
    site.take("cesar/consumer/cesar/state", {"state": "offline"})
    assert site.browser.get("/healthz").status_code == 503
    assert "cesar_web_connected 1" in site.browser.get("/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "http_status"),
    [("GET", "/api/nothing", 404), ("PUT", "/api/jobs", 405), ("GET", "/nothing", 404)],
)
def test_other_errors_are_problems_too(site: Site, method: str, path: str, http_status: int) -> None:
    problem(site.browser.request(method, path), http_status)


def test_a_failure_of_the_server_shows_nothing_of_its_inside(site: Site) -> None:
    def fail(_item: Submission) -> None:
        raise RuntimeError("secret path /srv/x")

    site.bus.on_submit = fail
    response = upload(site)
    assert "secret" not in response.text
    assert problem(response, 500)["code"] == "internal"


# -- the OpenAPI document ----------------------------------------------------------------------------------------------


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_the_document_describes_every_route_and_refers_to_nothing_that_is_not_there(site: Site) -> None:
    document = site.browser.get("/openapi.json").json()
    described = {
        (path, method.upper())
        for path, entry in document["paths"].items()
        for method in entry
        if method != "parameters"
    }
    routes = {
        (route.path, method)
        for route in site.app.asgi.routes
        if isinstance(route, Route) and route.path.startswith("/api/") and route.path != "/api/about"
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == routes | {("/healthz", "GET")}
    assert len(
        {
            entry["operationId"]
            for path in document["paths"].values()
            for name, entry in path.items()
            if name != "parameters"
        }
    ) == len(described)
    for reference in references(document):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_what_is_listed_is_as_the_document_says(site: Site) -> None:
    schemas = {"components": openapi_document()["components"]}
    site.take("cesar/status/a", status("a", "completed"))
    site.take(
        "cesar/consumer/cesar/queue",
        {
            "activity": "idle",
            "queued": 0,
            "job_id": None,
            "oldest_age": None,
            "paused": False,
            "completed_total": 0,
            "error_total": 0,
            "cancelled_total": 0,
            "rejected_total": 0,
            "deleted_total": 0,
        },
    )
    (job,) = site.browser.get("/api/jobs").json()["jobs"]
    jsonschema.validate(job, {**schemas, "$ref": "#/components/schemas/Job"})
    (consumer,) = site.browser.get("/api/consumers").json()["consumers"]
    consumer_schema = schemas["components"]["schemas"]["Consumer"]
    assert set(consumer_schema["required"]) <= set(consumer)
