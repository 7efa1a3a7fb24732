"""The page's own files."""

import gzip
import json
import re
from pathlib import Path

import pytest

from cesar_mqtt.gateway.web.pages import page_files, page_languages
from tests.unit.gateway.web.site import Site

FILES = {name: file.content.decode() for name, file in page_files().items()}
LANGUAGES = {name: json.loads(text) for name, text in FILES.items() if name.startswith("languages/")}
SCRIPTS = "\n".join(text for name, text in FILES.items() if name.endswith(".js"))


def test_every_language_has_the_same_texts_with_the_same_places_for_values() -> None:
    assert set(page_languages()) >= {"en", "de", "es", "fr"}
    english = LANGUAGES["languages/en.json"]
    for name, texts in LANGUAGES.items():
        assert texts.keys() == english.keys(), name
        for key, text in texts.items():
            assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", english[key])), (name, key)


def test_every_text_that_the_page_names_exists_and_every_text_is_used() -> None:
    named = set(re.findall(r'data-(?:text|label|hint)="(\w+)"', FILES["index.html"]))
    named |= set(re.findall(r'\bt\(\s*"(\w+)"', SCRIPTS))
    quoted = set(re.findall(r'"(\w+)"', SCRIPTS))
    made = ("state_", "activity_", "fact_", "warning_")  # and a value of the bus
    english = set(LANGUAGES["languages/en.json"]) - {"_name"}
    assert named - english == set()
    unused = {key for key in english - named - quoted if not key.startswith(made) and not key.endswith("_named")}
    assert unused == set()


def test_the_page_has_no_script_style_or_address_of_others() -> None:
    page = FILES["index.html"]
    assert re.findall(r"<script[^>]*>(.+?)</script>", page, re.DOTALL) == []
    assert re.findall(r'\s(?:on\w+|style)="', page) == []
    for name, text in FILES.items():
        assert re.findall(r"(?:https?:)?//[a-z]+\.", text.replace("http://www.w3.org/2000/svg", "")) == [], name
    assert not re.search(r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|eval\(|new Function", SCRIPTS)


def test_all_addresses_are_relative_so_that_a_proxy_may_add_a_path() -> None:
    addresses = re.findall(r'(?:src|href)="([^"]+)"', FILES["index.html"])
    addresses += re.findall(r"(?:fetch|request|act|open)\(\s*[\"'`](?:POST\", \")?([^\"'`]+)", SCRIPTS)
    addresses += re.findall(r"EventSource\([^)]*[\"'`]([^\"'`]+)", SCRIPTS)
    assert len(addresses) > 8
    assert [address for address in addresses if address.startswith("/")] == []


def test_the_page_weighs_little() -> None:
    sent = [gzip.compress(text.encode()) for name, text in FILES.items() if not name.startswith("languages/")]
    largest = max(len(gzip.compress(FILES[name].encode())) for name in LANGUAGES)
    assert sum(map(len, sent)) + largest < 60_000


def test_files_are_compressed_where_that_is_understood_and_not_sent_again(tmp_path: Path) -> None:
    browser = Site(tmp_path).browser
    compressed = browser.get("/page.js", headers={"Accept-Encoding": "gzip"})
    assert compressed.headers["Content-Encoding"] == "gzip"
    assert compressed.text == FILES["page.js"]
    bare = browser.get("/page.js", headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in bare.headers
    assert bare.text == FILES["page.js"]
    assert browser.get("/page.js", headers={"If-None-Match": bare.headers["ETag"]}).status_code == 304


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/style.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/icon.svg", "image/svg+xml"),
        ("/languages/de.json", "application/json"),
        ("/languages.json", "application/json"),
    ],
)
def test_every_file_has_its_type(tmp_path: Path, path: str, kind: str) -> None:
    assert Site(tmp_path).browser.get(path).headers["Content-Type"].startswith(kind)
