"""The contract as files. Texts are regenerated (`python -m tests.golden.update`); the structure has to stay."""

import difflib
import json
from typing import Any

import pytest

from tests.golden import contract

_REGENERATE = "if that is meant: python -m tests.golden.update, and read the diff"


@pytest.fixture(scope="module")
def produced() -> dict[str, str]:
    return contract.golden_files()


@pytest.mark.parametrize(
    "name",
    ["asyncapi.json", "schemas.json", "payloads.json", "discovery-device.json", "discovery-component.json", "help.txt"],
)
def test_the_contract_is_as_in_the_golden_file(name: str, produced: dict[str, str]) -> None:
    golden = (contract.FOLDER / name).read_text(encoding="utf-8")

    assert produced[name] == golden, f"{_difference(name, golden, produced[name])}\n{_REGENERATE}"


def test_there_is_a_golden_file_for_everything_produced(produced: dict[str, str]) -> None:
    files = {path.name for path in contract.FOLDER.iterdir() if path.suffix in {".json", ".txt"}}

    assert files == {*produced, contract.STRUCTURE}


def test_every_message_with_a_json_payload_has_an_example(produced: dict[str, str]) -> None:
    examples = json.loads(produced["payloads.json"])

    assert [name for name, payloads in examples.items() if not payloads] == ["audio"]  # a file, not JSON


def test_schemas_topics_and_messages_mean_what_they_meant() -> None:
    golden = json.loads((contract.FOLDER / contract.STRUCTURE).read_text(encoding="utf-8"))
    now = json.loads(contract.render_structure(contract.structure()))

    before, after = _lines(golden), _lines(now)
    assert before == after, _difference(contract.STRUCTURE, "\n".join(before), "\n".join(after))


def test_without_its_texts_a_schema_keeps_the_fields_that_are_called_like_texts() -> None:
    schema = {
        "title": "T",
        "properties": {"title": {"$ref": "#/$defs/Text", "description": "d"}},
        "required": ["b", "a"],
        "allOf": [{"summary": "s"}],
    }

    assert contract.bare(schema, {"#/$defs/Text": {"type": "string", "title": "Text"}}) == {
        "allOf": [{}],
        "properties": {"title": {"type": "string"}},
        "required": ["a", "b"],
    }


def _lines(parts: dict[str, dict[str, Any]]) -> list[str]:
    return json.dumps(parts, indent=1, sort_keys=True, ensure_ascii=False).splitlines()


def _difference(name: str, golden: str, now: str) -> str:
    lines = difflib.unified_diff(golden.splitlines(), now.splitlines(), f"golden/{name}", "now", lineterm="", n=6)
    return "\n".join(lines)
