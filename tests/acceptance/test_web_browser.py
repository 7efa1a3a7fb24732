"""The page in a real browser: Debian's Chromium, which the tests only drive."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Route, expect, sync_playwright
from playwright.sync_api import Page as Tab

from cesar_mqtt.protocol.fields import FORMATS
from cesar_mqtt.protocol.formats import Content, render
from cesar_mqtt.transcript import Segment, Word
from tests.acceptance.harness import PATIENCE_S, SPEECH, SPOKEN, Bus, Consumer, wait_until, words
from tests.acceptance.web_page import Page, alone
from tests.conftest import Mosquitto, find_free_port, need

pytestmark = [pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]

DROP = """async (files) => {
    const data = new DataTransfer();
    for (const [name, bytes] of files) data.items.add(new File([Uint8Array.from(bytes)], name));
    const options = { dataTransfer: data, bubbles: true, cancelable: true };
    const drop = document.getElementById("drop");
    for (const kind of ["dragover", "drop"]) drop.dispatchEvent(new DragEvent(kind, options));
}"""

# So that what plays stays at a word until the test has looked.
SLOWLY = "document.getElementById('player').playbackRate = 1 / 16"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=need("chromium"), args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Open a tab of its own; in the end no script may have failed, and the policy may not have been violated."""
    contexts, complaints = [], []

    def open_(**options: Any) -> Tab:
        contexts.append(browser.new_context(**{"locale": "en-US", "permissions": ["microphone"], **options}))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(PATIENCE_S * 1000)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.on(
            "console",
            lambda message: complaints.append(message.text) if "Content Security Policy" in message.text else None,
        )
        return tab

    expect.set_options(timeout=PATIENCE_S * 1000)
    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


class Shown:
    """A page on a bus without a consumer: the test publishes what a consumer would."""

    def __init__(self, page: Page, bus: Bus) -> None:
        self.url = page.url
        self.bus = bus
        self.bus.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
        self.bus.publish("cesar/consumer/cesar/queue", {"activity": "idle", "queued": 0, "paused": False}, retain=True)

    def job(self, job_id: str, state: str = "completed", **fields: Any) -> None:
        final = state in ("completed", "error", "cancelled")
        document = {
            "job_id": job_id,
            "status": state,
            "attempt": 1,
            "created_at": "2026-01-23T21:45:00.120Z",
            "completed_at": "2026-01-23T21:46:00.120Z" if final else None,
            "audio_source": "a.wav",
            "model_size": "base",
            "result_text": "Hello there." if state == "completed" else None,
            "formats": [],
            "metadata": {"file": f"{job_id}.wav"},
            "consumer": "cesar",
            "detected_language": "en",
            "audio_duration": 65.0,
            "progress": 0.4,
            "eta": 70.0,
            **fields,
        }
        self.bus.publish(f"cesar/status/{job_id}", document, retain=True)

    def uploaded(self) -> str:
        """Wait for a recording that the page sends; return the id of its job."""
        level = "cesar/audio/"
        found = list[str]()

        def has_arrived() -> bool:
            found.extend(m.topic.removeprefix(level) for m in self.bus.messages if m.topic.startswith(level))
            return bool(found)

        wait_until(has_arrived)
        return found[0]


@pytest.fixture
def shown(mosquitto: Mosquitto, join: Join, tmp_path: Path) -> Iterator[Shown]:
    with alone(mosquitto, tmp_path, needs_consumer=False) as page:
        bus = join(mosquitto.port)
        yield Shown(page, bus)
        bus.leave()
        bus.messages.clear()  # they are the test's own


def row(tab: Tab, name: str) -> Locator:
    return tab.locator("#jobs > li", has=tab.get_by_role("button", name=name, exact=True))


def violations(tab: Tab) -> list[str]:
    return [
        f"{found['id']}: {[node['html'] for node in found['nodes']]}" for found in Axe().run(tab).response["violations"]
    ]


@pytest.mark.model
def test_from_a_dropped_file_to_a_downloaded_srt_with_a_consumer_killed_in_between(
    mosquitto: Mosquitto, serve: Serve, open_tab: Callable[..., Tab]
) -> None:
    page = Page(find_free_port())
    consumer = serve("--broker", mosquitto.url, "--web", f"127.0.0.1:{page.port}")
    page.wait_ready()
    tab = open_tab()
    with closing(page):
        tab.goto(page.url)
        tab.get_by_role("button", name="Pause cesar").click()
        expect(tab.get_by_role("button", name="Resume cesar")).to_be_visible()
        tab.evaluate(DROP, [["call.wav", list(SPEECH.read_bytes())], ["junk.txt", list(b"no recording")]])
        expect(row(tab, "call.wav")).to_contain_text("queued")
        expect(tab.locator("#uploads > li")).to_have_count(0)

        consumer.kill()
        expect(tab.locator("#connection")).to_have_text(re.compile("^No connection to the server"))
        consumer.start()
        expect(tab.locator("#connection")).to_have_text("Connected")
        tab.get_by_role("button", name="Resume cesar").click()
        expect(row(tab, "call.wav")).to_contain_text("completed")
        expect(row(tab, "junk.txt").locator(".problem")).to_contain_text("cannot be decoded")

        row(tab, "call.wav").get_by_role("button", name="call.wav", exact=True).click()
        detail = tab.get_by_role("dialog")
        expect(detail.locator(".word")).to_have_count(len(SPOKEN))
        assert words(detail.locator("#transcript").inner_text()) == SPOKEN
        tab.evaluate(SLOWLY)
        detail.locator(".word", has_text="lamp").click()
        expect(detail.locator(".now")).to_have_text(re.compile("lamp"))
        assert tab.evaluate("document.getElementById('player').currentTime") > 2
        with tab.expect_download() as download:
            detail.get_by_role("link", name="Download srt").click()
        assert "00:00:00,000 -->" in Path(download.value.path()).read_text()
        assert download.value.suggested_filename.endswith(".srt")
        tab.keyboard.press("Escape")

        tab.get_by_role("searchbox").fill("PLUMBER")
        expect(tab.locator("#jobs > li")).to_have_count(1)
        expect(tab.locator("#jobs mark")).to_have_text("plumber")
        tab.get_by_role("searchbox").fill("")
        for answer, left in (("Keep it", 2), ("Delete", 1)):
            row(tab, "junk.txt").get_by_role("button", name="Delete junk.txt").click()
            tab.get_by_role("dialog").get_by_role("button", name=answer).click()
            expect(tab.locator("#jobs > li")).to_have_count(left)

        tab.reload()  # the recording is in the browser's own storage
        row(tab, "call.wav").get_by_role("button", name="call.wav", exact=True).click()
        expect(tab.locator("#player")).to_be_visible()
        tab.keyboard.press("Escape")
        tab.get_by_role("button", name="Record").click()
        expect(tab.locator("#record-time")).to_have_text(re.compile("^00:(0[1-9]|[1-5][0-9])$"))
        tab.get_by_role("button", name="Stop and transcribe").click()
        expect(tab.locator("#jobs > li", has_text="Recording")).to_contain_text("completed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_that_shuts_a_user_out(
    shown: Shown, open_tab: Callable[..., Tab], scheme: str, width: int
) -> None:
    shown.job("done")
    shown.job("broken", "error", error_code="audio_unreadable", error_message="It cannot be decoded.", result_text=None)
    shown.job("running", "processing")
    shown.job("waiting", "queued", queue_position=1)
    tab = open_tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.goto(shown.url)
    expect(tab.locator("#jobs > li")).to_have_count(4)
    rejection = {
        "reason": "queue_full",
        "detail": "The queue is full.",
        "job_id": "x",
        "received_at": "2026-01-23T21:45:00Z",
    }
    shown.bus.publish("cesar/rejected", rejection)
    for summary in tab.locator("summary").all():
        summary.click()
    expect(tab.locator("#rejected")).to_contain_text("The queue is full.")
    assert violations(tab) == []
    row(tab, "done.wav").get_by_role("button", name="done.wav", exact=True).click()
    expect(tab.locator("#transcript")).to_have_text("Hello there.")
    assert violations(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_everything_can_be_reached_with_the_keyboard(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.job("done")
    tab = open_tab()
    tab.goto(shown.url)
    expect(tab.locator("#jobs > li")).to_have_count(1)
    tab.keyboard.press("Tab")
    expect(tab.locator(":focus")).to_have_text("Skip to the jobs")
    tab.keyboard.press("Enter")
    expect(tab.locator(":focus")).to_have_text("Jobs")
    names = []
    for _ in range(5):
        tab.keyboard.press("Tab")
        names.append(tab.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert names == ["query", "filter", "done.wav", "Delete", "Rejections"]
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("dialog")).to_contain_text("done.wav")
    expect(tab.locator(":focus")).to_have_text("Keep it")
    tab.keyboard.press("Escape")
    expect(tab.locator(":focus")).to_have_text("Delete")


LONG = Content(
    text="one two three four five " * 200,
    segments=[
        Segment(
            number + 1,
            number * 2.5,
            number * 2.5 + 2.5,
            "one two three four five",
            -0.2,
            0.01,
            tuple(
                Word(number * 2.5 + place / 2, number * 2.5 + place / 2 + 0.5, f" {text}", 0.9)
                for place, text in enumerate(("one", "two", "three", "four", "five"))
            ),
        )
        for number in range(200)
    ],
    language="en",
    language_probability=0.9,
    duration_s=500.0,
    task="transcribe",
)
FOCUSED = """() => {
    const { ariaLabel, id, dataset, textContent } = document.activeElement;
    if (document.activeElement === document.body) return "the browser";
    return ariaLabel || dataset.text || dataset.verb || id || textContent.trim();
}"""


def go(tab: Tab, name: str) -> list[str]:
    """Press Tab until this is focused; return what was focused on the way."""
    passed = list[str]()
    while name not in passed:
        assert len(passed) < 40, passed
        tab.keyboard.press("Tab")
        passed.append(tab.evaluate(FOCUSED))
    return passed


def test_a_recording_is_chosen_and_heard_word_by_word_without_a_mouse(
    shown: Shown, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab()
    tab.on("filechooser", lambda _: None)  # from now on: else the key may be faster than the test
    tab.goto(shown.url)
    expect(tab.locator("#connection")).to_have_text("Connected")
    go(tab, "files")
    with tab.expect_file_chooser() as chooser:
        tab.keyboard.press("Space")
    chooser.value.set_files({"name": "call.wav", "mimeType": "audio/wav", "buffer": SPEECH.read_bytes()})
    job_id = shown.uploaded()
    shown.bus.publish("cesar/consumer/cesar/state", {"state": "offline"}, retain=True)
    shown.bus.publish(f"cesar/result/{job_id}/json", render("json", LONG)[0], retain=True)
    shown.job(job_id, metadata={"file": "call.wav"}, formats=["json"])
    expect(tab.locator("#uploads > li")).to_have_count(0)
    go(tab, "open")
    tab.keyboard.press("Enter")
    expect(tab.locator(":focus")).to_have_text("Close")
    expect(tab.locator("#transcript.playable .word")).to_have_count(1000)

    # Round the dialog once: nothing behind it is reached, and the thousand words are one stop. After the last one comes
    # the browser's own bar, and the dialog itself, in which the arrow keys scroll.
    passed = go(tab, "close")
    own = {"copy", *(f"Download {name}" for name in FORMATS), "delete", "player", "one", "close"}
    assert set(passed) - {"the browser", "detail"} == own
    assert passed.count("one") == 1

    go(tab, "one")
    word = tab.locator(":focus")
    assert word.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
    for key, text, number in (
        ("ArrowRight", "two", 1),
        ("ArrowDown", "one", 5),
        ("ArrowRight", "two", 6),
        ("ArrowLeft", "one", 5),
        ("ArrowUp", "one", 0),
        ("ArrowUp", "one", 0),
        ("End", "five", 999),
        ("ArrowRight", "five", 999),
        ("Home", "one", 0),
        ("ArrowDown", "one", 5),
    ):
        tab.keyboard.press(key)
        expect(word).to_have_text(re.compile(text))
        expect(word).to_have_attribute("data-number", str(number))
        expect(word).to_be_in_viewport()
    tab.evaluate(SLOWLY)
    tab.keyboard.press("Enter")
    expect(tab.locator(".now")).to_have_attribute("data-number", re.compile("^[67]$"))  # it plays
    assert tab.evaluate("document.getElementById('player').currentTime") >= 2.5
    expect(word).to_have_attribute("data-number", "5")  # and does not take the focus
    assert violations(tab) == []


def test_a_job_is_read_and_deleted_without_a_mouse(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.job("call")
    tab = open_tab()
    tab.goto(shown.url)
    expect(tab.locator("#jobs > li")).to_have_count(1)
    go(tab, "open")
    tab.keyboard.press("Enter")
    expect(tab.locator("#transcript")).to_have_text("Hello there.")
    go(tab, "close")
    tab.keyboard.press("Enter")
    expect(tab.locator("#detail")).to_be_hidden()
    assert tab.evaluate(FOCUSED) == "open"
    go(tab, "Delete call.wav")
    tab.keyboard.press("Enter")
    expect(tab.locator("#question")).to_contain_text("This cannot be undone")
    assert tab.evaluate(FOCUSED) == "keep"  # the safe answer
    tab.keyboard.press("Enter")
    expect(tab.locator("#question")).to_be_hidden()
    assert tab.evaluate(FOCUSED) == "Delete call.wav"
    tab.keyboard.press("Enter")
    go(tab, "question-yes")
    with tab.expect_request(lambda request: request.method == "DELETE") as deleted:
        tab.keyboard.press("Enter")
    assert deleted.value.url == f"{shown.url}/api/jobs/call"


def test_an_answer_is_that_of_the_question_that_is_shown(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.job("call")
    tab = open_tab()
    tab.goto(shown.url)
    deletes = list[str]()
    tab.on("request", lambda request: deletes.append(request.method) if request.method == "DELETE" else None)
    delete = tab.get_by_role("button", name="Delete call.wav")
    delete.click()
    tab.keyboard.press("Escape")
    expect(tab.locator("#question")).to_be_hidden()
    delete.click()
    tab.evaluate(
        """() => {
            document.getElementById("question-no").click();  // its event `close` is still to come
            document.querySelector("[aria-label='Delete call.wav']").click();
        }"""
    )
    expect(tab.locator("#question")).to_be_visible()
    assert deletes == []
    with tab.expect_request(lambda request: request.method == "DELETE"):
        tab.locator("#question-yes").click()
    assert deletes == ["DELETE"]


def test_the_focus_stays_where_the_queue_moves(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.job("first", "processing")
    shown.job("second", "queued", queue_position=1)
    tab = open_tab()
    tab.goto(shown.url)
    expect(tab.locator("#jobs > li")).to_have_count(2)
    row(tab, "second.wav").get_by_role("button", name="Cancel second.wav").focus()
    shown.job("first")
    shown.job("second", "processing")
    expect(tab.locator("#jobs > li").first).to_contain_text("second.wav")
    expect(row(tab, "second.wav").get_by_role("button", name="Delete second.wav")).to_have_count(0)
    assert tab.evaluate(FOCUSED) == "Cancel second.wav"
    shown.job("second")
    expect(row(tab, "second.wav")).to_contain_text("completed")
    assert tab.evaluate("document.activeElement.textContent") == "second.wav"
    tab.keyboard.press("Enter")
    expect(tab.locator("#detail")).to_be_visible()
    shown.bus.publish("cesar/status/second", b"", retain=True)
    expect(tab.locator("#detail")).to_be_hidden()
    expect(tab.locator("#jobs-title")).to_be_focused()


SCRIPTS = """async () => {
    const { clock, languageName, moment, plain, t, verbs } = await import("./page.js");
    return {
        clock: [0, 59.9, 60, 3599, 3600, 90061, -5].map(clock),
        plain: plain("a\\u202eb\\u0000c\\u2066d\\ufeff") + plain(null) + plain(7),
        moment: [moment("nonsense\\u202e"), moment("2026-01-23T21:45:00Z").includes("2026")],
        language: [languageName("de"), languageName("!!")],
        verbs: ["queued", "processing", "completed", "error", "cancelled"].map((status) => verbs({ status }).join("+")),
        text: [t("counts", { shown: 1, total: "{shown}" }), t("eta"), t("no_such_text"), t("constructor")],
    };
}"""


def test_the_functions_of_the_scripts(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(timezone_id="UTC")
    tab.goto(shown.url)
    expect(tab.locator("#jobs-title")).to_have_text("Jobs")
    assert tab.evaluate(SCRIPTS) == {
        "clock": ["00:00", "00:59", "01:00", "59:59", "1:00:00", "25:01:01", "00:00"],
        "plain": "a\u00b7b\u00b7c\u00b7d\u00b77",
        "moment": ["nonsense\u00b7", True],
        "language": ["German", "!!"],
        "verbs": ["cancel+delete", "cancel", "delete", "retry+delete", "retry+delete"],
        "text": ["1 of {shown} jobs", " left", "no_such_text", "constructor"],
    }


def test_the_page_has_the_order_of_the_api(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.job("old", completed_at="2026-01-01T00:00:00.000Z")
    shown.job("second", "queued", queue_position=2)
    shown.job("broken", "error", completed_at="2026-01-02T00:00:00.000Z", error_code="internal", result_text=None)
    shown.job("first", "queued", queue_position=1)
    shown.job("urgent", "queued", queue_position=3, priority=9)
    shown.job("behind", "queued", queue_position=None, created_at="2026-01-24T00:00:00.000Z")
    shown.job("running", "processing")
    tab = open_tab()
    tab.goto(shown.url)
    expect(tab.locator("#jobs > li")).to_have_count(7)
    listed = [job["job_id"] for job in tab.request.get(f"{shown.url}/api/jobs").json()["jobs"]]
    assert tab.locator("#jobs > li").evaluate_all("rows => rows.map((row) => row.dataset.id)") == listed
    assert listed == ["running", "urgent", "first", "second", "behind", "broken", "old"]


def test_a_status_with_fields_of_wrong_kinds_stops_nothing(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    names = (
        "created_at",
        "completed_at",
        "audio_source",
        "detected_language",
        "warnings",
        "formats",
        "progress",
        "eta",
    )
    for number, value in enumerate((7, True, ["x", 7], {"x": 1}, "text", -1e300)):
        fields: dict[str, Any] = {
            **dict.fromkeys(names, value),
            "audio_duration": value,
            "speakers": value,
            "metadata": value,
        }
        shown.job(f"wrong-{number}", **fields)
        shown.job(f"runs-{number}", "processing", **fields)
    shown.bus.publish("cesar/consumer/odd/state", {"state": "online"}, retain=True)
    shown.bus.publish("cesar/consumer/odd/info", {"models": "base", "default_model": ["x"], "limits": 7}, retain=True)
    shown.bus.publish("cesar/consumer/odd/queue", {"activity": 7, "queued": ["x"], "paused": "no"}, retain=True)
    tab = open_tab()
    tab.goto(shown.url)
    expect(tab.locator("#jobs > li")).to_have_count(12)
    for number in range(6):
        tab.locator(f"#jobs > li[data-id=wrong-{number}] button.name").click()
        expect(tab.locator("#detail")).to_contain_text("Job")
        tab.keyboard.press("Escape")
    shown.job("fine")
    expect(row(tab, "fine.wav")).to_contain_text("completed")


SPOKEN_BY_TWO = (("Speaker 1", "Who is there?"), ("Speaker 2", "Speaker 1: that is me."), ("Speaker 1", "Come in."))
CALL = Content(
    text=" ".join(text for _, text in SPOKEN_BY_TWO),
    segments=[
        Segment(number, number * 9.0, number * 9.0 + 1, text, -0.2, 0.01, speaker=speaker)
        for number, (speaker, text) in enumerate(SPOKEN_BY_TWO, start=1)
    ],
    language="en",
    language_probability=0.9,
    duration_s=40.0,
    task="transcribe",
)
NAME = "Ada & <b>_Co $1"
STORED_NAMES = 'JSON.parse(localStorage.getItem("speakers"))'


def test_speakers_have_colours_and_names_of_this_browser_in_the_view_and_in_downloads(
    shown: Shown, open_tab: Callable[..., Tab]
) -> None:
    shown.bus.publish("cesar/consumer/cesar/state", {"state": "offline"}, retain=True)
    formats = [*FORMATS]
    for name in formats:
        shown.bus.publish(f"cesar/result/call/{name}", render(name, CALL)[0], retain=True)
    shown.job("call", result_text=CALL.text, formats=formats, speakers=2)
    tab = open_tab(permissions=["clipboard-read", "clipboard-write"])
    tab.goto(shown.url)
    detail = tab.get_by_role("dialog")

    def open_call() -> list[str]:
        row(tab, "call.wav").get_by_role("button", name="call.wav", exact=True).click()
        expect(detail.locator(".speaker")).to_have_count(3)
        return detail.locator(".speaker").all_inner_texts()

    assert open_call() == ["Speaker 1", "Speaker 2", "Speaker 1"]
    colours = detail.locator(".speaker").evaluate_all("found => found.map((each) => getComputedStyle(each).color)")
    assert (len(set(colours)), colours[0]) == (2, colours[2])
    detail.get_by_label("Name of Speaker 1").fill(NAME)
    tab.keyboard.press("Tab")
    assert detail.locator(".speaker").all_inner_texts() == [NAME, "Speaker 2", NAME]
    assert violations(tab) == []
    tab.reload()
    assert open_call() == [NAME, "Speaker 2", NAME]

    named = [replace(each, speaker={"Speaker 1": NAME}.get(each.speaker or "", each.speaker)) for each in CALL.segments]
    for name in formats:
        with tab.expect_download() as download:
            detail.get_by_role("link", name=f"Download {name}").click()
        assert download.value.suggested_filename == f"call.{name}"
        read = json.loads if name == "json" else str
        expected = render(name, replace(CALL, segments=named))[0].decode()
        assert read(Path(download.value.path()).read_text()) == read(expected)
    detail.get_by_role("button", name="Copy the text").click()
    expect(tab.locator("#announcement")).to_have_text("The text is copied.")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == f"{NAME}: Who is there?\nSpeaker 2: Speaker 1: that is me.\n{NAME}: Come in."

    for label, given in (("Name of Speaker 2", "Grace"), ("Name of Speaker 1", "")):
        detail.get_by_label(label).fill(given)
        tab.keyboard.press("Tab")
    assert detail.locator(".speaker").all_inner_texts() == ["Speaker 1", "Grace", "Speaker 1"]
    assert tab.evaluate(STORED_NAMES) == [["call", [["Speaker 2", "Grace"]]]]
    shown.bus.publish("cesar/status/call", b"", retain=True)
    expect(tab.locator("#jobs > li")).to_have_count(0)
    assert tab.evaluate(STORED_NAMES) == []


def test_a_diarization_is_shown_and_can_be_repeated_where_it_failed(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.job("fails", diarization_error="A model is missing.", warnings=["diarization_failed"])
    shown.job("runs", "processing", progress=0.99, diarization_progress=0.5)
    tab = open_tab()
    tab.goto(shown.url)
    expect(row(tab, "runs.wav")).to_contain_text("telling speakers apart, 50%")
    expect(row(tab, "fails.wav").get_by_role("button", name="Retry fails.wav")).to_be_visible()
    row(tab, "fails.wav").get_by_role("button", name="fails.wav", exact=True).click()
    expect(tab.locator("#detail-facts")).to_contain_text("A model is missing.")


RECORDED = """const send = XMLHttpRequest.prototype.send;
XMLHttpRequest.prototype.send = function (form) {
    window.sent = [...form.entries()].filter(([, value]) => typeof value === "string");
    send.call(this, form);
};"""


def test_how_many_speakers_there_are_can_be_said_where_they_are_told_apart(
    shown: Shown, open_tab: Callable[..., Tab]
) -> None:
    tab = open_tab()
    tab.add_init_script(RECORDED)
    tab.goto(shown.url)
    tab.locator("#options summary").click()
    least, most = tab.get_by_label("At least so many speakers"), tab.get_by_label("At most so many speakers")
    expect(least).to_be_disabled()
    tab.locator("select[name=diarize]").select_option("Label speakers")
    least.fill("2")
    most.fill("3")
    with tab.expect_request("**/api/jobs"):
        tab.evaluate(DROP, [["call.wav", list(b"RIFF")]])
    sent = dict(tab.evaluate("window.sent"))
    assert (sent["diarize"], sent["min_speakers"], sent["max_speakers"]) == ("true", "2", "3")
    tab.locator("select[name=diarize]").select_option("One per channel")
    expect(most).to_be_disabled()


HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "{{constructor.constructor('window.hacked=1')()}}",
    "&lt;b&gt;bold&lt;/b&gt;",
    "\u202egnp.exe\u2066\u200f",
    "w" * 1_000_000,
)


def test_nothing_that_comes_over_the_bus_is_more_than_text(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    for number, text in enumerate(HOSTILE):
        name = f"{text[:100]}-{number}"
        shown.job(
            f"done-{number}",
            result_text=text,
            metadata={"file": name},
            detected_language=text[:20],
            warnings=[text[:200]],
        )
        shown.job(
            f"bad-{number}",
            "error",
            error_code=text[:50],
            error_message=text,
            audio_source=text[:500],
            metadata={},
            result_text=None,
        )
    shown.bus.publish("cesar/consumer/evil/state", {"state": "online"}, retain=True)
    shown.bus.publish(
        "cesar/consumer/evil/info", {"models": list(HOSTILE[:7]), "default_model": HOSTILE[0]}, retain=True
    )
    shown.bus.publish(
        "cesar/consumer/evil/queue", {"activity": HOSTILE[1], "queued": HOSTILE[0], "paused": HOSTILE[2]}, retain=True
    )
    tab = open_tab(viewport={"width": 360, "height": 740})
    tab.goto(shown.url)
    expect(tab.locator("#jobs > li")).to_have_count(2 * len(HOSTILE))
    for text in HOSTILE:
        rejection = {
            "reason": text[:50],
            "detail": text,
            "topic": text[:50],
            "job_id": None,
            "payload_excerpt": text,
            "received_at": text[:20],
        }
        shown.bus.publish("cesar/rejected", rejection)
    tab.locator("#rejections summary").click()
    expect(tab.locator("#rejected > li")).to_have_count(len(HOSTILE))
    for number in range(len(HOSTILE)):
        tab.locator(f"#jobs > li[data-id=done-{number}] button.name").click()
        expect(tab.locator("#transcript p")).to_have_count(1)
        tab.keyboard.press("Escape")
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("script, img, svg, iframe, b").count() == 1  # the page's own script
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200f]", tab.locator("body").inner_text())
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_words_and_speakers_of_a_transcript_are_only_text(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.bus.publish("cesar/consumer/cesar/state", {"state": "offline"}, retain=True)
    words = [{"word": f" {text}", "start": 0.0, "end": 1.0} for text in HOSTILE]
    segments = [{"start": 0.0, "end": 1.0, "text": text, "speaker": text[:99], "words": words} for text in HOSTILE]
    shown.bus.publish("cesar/result/evil/json", {"text": "", "segments": segments}, retain=True)
    shown.job("evil", formats=["json"], warnings=["audio_quiet", HOSTILE[1]])
    tab = open_tab(viewport={"width": 360, "height": 740})
    tab.goto(shown.url)
    row(tab, "evil.wav").get_by_role("button", name="evil.wav", exact=True).click()
    expect(tab.locator("#transcript .word")).to_have_count(len(HOSTILE) ** 2)
    expect(tab.locator("#detail-facts")).to_contain_text(f"the recording is quiet and was amplified, {HOSTILE[1]}")
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("#detail").locator("script, img, svg, iframe, b").count() == 0
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200f]", tab.locator("#transcript .word").nth(6).inner_text())
    assert tab.evaluate("document.getElementById('detail').scrollWidth <= innerWidth")


def test_a_thousand_jobs_are_drawn_a_hundred_at_a_time(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    for number in range(1000):
        shown.job(f"job-{number:03d}", completed_at=f"2026-01-23T21:{number // 60:02d}:{number % 60:02d}.000Z")
    tab = open_tab()
    tab.goto(shown.url)
    expect(tab.locator("#counts")).to_have_text("1000 of 1000 jobs")
    expect(tab.locator("#jobs > li").first).to_contain_text("job-999")
    assert tab.locator("#jobs > li").count() <= 200
    shown.job("job-000", "queued", queue_position=1, completed_at=None)
    expect(tab.locator("#jobs > li").first).to_contain_text("job-000")
    for _ in range(10):
        tab.locator("#jobs > li").last.scroll_into_view_if_needed()
        tab.wait_for_timeout(50)
    assert tab.locator("#jobs > li").count() > 300


@pytest.mark.parametrize(
    ("locale", "heading"), [("de-AT", "Aufträge"), ("es-MX", "Trabajos"), ("fr-CA", "Tâches"), ("ja-JP", "Jobs")]
)
def test_the_page_speaks_the_language_of_the_browser(
    shown: Shown, open_tab: Callable[..., Tab], locale: str, heading: str
) -> None:
    tab = open_tab(locale=locale)
    tab.goto(shown.url)
    expect(tab.locator("#jobs-title")).to_have_text(heading)
    assert tab.evaluate("document.documentElement.lang") == (locale[:2] if locale != "ja-JP" else "en")
    assert tab.locator("[data-text]").filter(has_text=re.compile("^[a-z]+_[a-z_]+$")).count() == 0


def test_texts_that_arrive_after_the_queue_are_shown_all_the_same(shown: Shown, open_tab: Callable[..., Tab]) -> None:
    shown.job("done")
    tab, held = open_tab(), list[Route]()
    tab.route("**/languages/*.json", lambda route: held.append(route))  # noqa: PLW0108 - playwright marks the function
    with tab.expect_response("**/api/events"), tab.expect_request("**/languages/*.json"):
        tab.goto(shown.url)
    expect(tab.locator("#workplace")).to_be_attached()
    held[0].continue_()
    expect(tab.locator("#consumers button")).to_have_text("Pause")
    expect(tab.locator("#consumers")).to_contain_text("0 queued")
    expect(row(tab, "done.wav")).to_contain_text("completed")


def test_a_password_is_asked_for(mosquitto: Mosquitto, tmp_path: Path, open_tab: Callable[..., Tab]) -> None:
    file = tmp_path / "password"
    file.write_text("sesame")
    file.chmod(0o600)
    settings = {"CESAR_WEB__PASSWORD_FILE": str(file)}
    with alone(mosquitto, tmp_path, needs_consumer=False, environ=settings) as page:
        tab = open_tab()
        tab.goto(page.url)
        for password, shown in (("wrong", "That is not the password."), ("sesame", "")):
            tab.get_by_label("Password").fill(password)
            tab.get_by_role("button", name="Log in").click()
            expect(tab.locator("#login-problem")).to_have_text(shown)
        expect(tab.locator("#jobs-title")).to_be_visible()
        assert violations(tab) == []
        tab.get_by_role("button", name="Log out").click()
        expect(tab.get_by_label("Password")).to_be_focused()
        assert violations(tab) == []
