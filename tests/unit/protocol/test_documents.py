"""The AsyncAPI document and the JSON Schemas: valid, complete, as strict as the parser; and how they are printed.

Which fields, values, topics and commands there are is in tests/golden/structure.json.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

from cesar_mqtt.cli.app import run
from cesar_mqtt.config import BrokerSettings, ConsumerSettings, Settings
from cesar_mqtt.errors import ExitCode
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.protocol.asyncapi import document
from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.examples import examples
from cesar_mqtt.protocol.fields import Payload
from cesar_mqtt.protocol.parsing import Accepted, parse_command, parse_submission
from cesar_mqtt.protocol.requests import AUDIO_FIELDS, JobRequest
from cesar_mqtt.protocol.schema import MODELS, READ, bundle, message_name, payload_schemas
from tests.conftest import PATIENCE_S
from tests.document import OFFICIAL, default_document, faults

Document = dict[str, Any]


@pytest.fixture
def contract() -> Document:
    return copy.deepcopy(default_document())


@pytest.fixture(scope="module")
def official() -> Draft7Validator:
    return Draft7Validator(json.loads(OFFICIAL.read_text()))


def test_the_page_on_topics_names_every_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "topics.md").read_text(encoding="utf-8")
    schemas = payload_schemas()
    fields = {
        name for model in ("JobRequest", "Status", "Queue", "Last", "Health") for name in schemas[model]["properties"]
    }
    assert len(fields) > 40
    missing = sorted(name for name in fields if f"`{name}`" not in page and f'"{name}"' not in page)
    assert not missing


# -- the document --------------------------------------------------------------------------------------------------


def test_the_document_is_valid_asyncapi(contract: Document, official: Draft7Validator) -> None:
    assert [error.json_path for error in official.iter_errors(contract)] == []


def test_the_official_schema_rejects_what_is_no_asyncapi(contract: Document, official: Draft7Validator) -> None:
    contract["operations"]["takeJob"]["action"] = "publish"
    assert not official.is_valid(contract)


def test_the_document_has_no_faults_that_the_official_schema_misses(contract: Document) -> None:
    assert faults(contract) == []


def _dangling(contract: Document) -> None:
    del contract["components"]["schemas"]["Word"]


def _undeclared(contract: Document) -> None:
    del contract["channels"]["results"]["parameters"]["format"]


def _invalid_example(contract: Document) -> None:
    contract["components"]["messages"]["status"]["examples"][0]["payload"]["progress"] = "half"


def _unknown_field(contract: Document) -> None:
    contract["components"]["messages"]["status"]["examples"][0]["payload"]["mood"] = "good"


def _wrong_channel(contract: Document) -> None:
    contract["operations"]["takeJob"]["messages"].append({"$ref": "#/channels/statuses/messages/status"})


def _unused(contract: Document) -> None:
    contract["operations"]["takeJob"]["messages"].pop()


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (_dangling, "#/components/schemas/Word leads nowhere"),
        (_undeclared, "channel results has ['format', 'job_id', 'prefix'] in its address and declares"),
        (_invalid_example, "example 0 of status: $.progress: "),
        (_unknown_field, "example 0 of status: $: Additional properties"),
        (
            _wrong_channel,
            "operation takeJob refers to #/channels/statuses/messages/status, which is of another channel",
        ),
        (_unused, "no operation refers to message line of channel jobs"),
    ],
)
def test_a_fault_that_the_official_schema_does_not_find_is_found_here(
    contract: Document, official: Draft7Validator, spoil: Callable[[Document], None], found: str
) -> None:
    spoil(contract)
    assert official.is_valid(contract)
    assert [fault[: len(found)] for fault in faults(contract)] == [found]


def test_the_document_names_this_consumer_and_no_secret() -> None:
    broker = BrokerSettings(url="wss://user:hunter2@broker.lan/mqtt?token=hunter2")
    settings = Settings(topic_prefix="home/voice", consumer=ConsumerSettings(name="attic"), broker=broker)
    contract = document(settings, parse_broker_url(broker.url))
    server = contract["servers"]["broker"]
    assert (server["host"], server["pathname"], server["protocol"]) == ("broker.lan:443", "/mqtt", "wss")
    assert server["bindings"]["mqtt"]["lastWill"]["topic"] == "home/voice/consumer/attic/state"
    parameters = contract["components"]["parameters"]
    assert (parameters["prefix"]["default"], parameters["consumer"]["default"]) == ("home/voice", "attic")
    assert "hunter2" not in json.dumps(contract)


def test_the_user_properties_of_an_audio_file_cannot_name_another_one(contract: Document) -> None:
    schemas = contract["components"]["schemas"]
    assert sorted(schemas["JobProperties"]["properties"]) == sorted(JobRequest.model_fields)
    assert sorted(schemas["AudioProperties"]["properties"]) == sorted(set(JobRequest.model_fields) - set(AUDIO_FIELDS))


# -- the payloads --------------------------------------------------------------------------------------------------


def test_every_payload_and_every_field_has_a_description() -> None:
    for name, schema in payload_schemas().items():
        assert schema["description"].endswith("."), name
        for field, inner in schema.get("properties", {}).items() if name in MODELS else ():
            assert inner["description"].endswith("."), f"{name}.{field}"


@pytest.mark.parametrize(("name", "model"), READ.items())
def test_the_description_of_a_field_of_a_request_ends_with_what_it_must_be(name: str, model: type[Payload]) -> None:
    for field, schema in payload_schemas()[name]["properties"].items():
        extra = model.model_fields[field].json_schema_extra
        assert isinstance(extra, dict)
        assert schema["description"].endswith(f" It must be {extra['must']}."), field
        assert "must" not in schema


@pytest.mark.parametrize(
    "payload",
    [
        {"audio_path": "a.wav"},
        {"audio_path": "a.wav", "audio_url": None},
        {"audio_path": None},
        {"audio_path": "a.wav", "audio_url": "http://host/a.wav"},
        {"audio_pth": "a.wav"},
        {"audio_path": ""},
        {"audio_path": 1},
        {"audio_path": "a.wav", "job_id": "no id"},
        {"audio_path": "a.wav", "task": "sing"},
        {"audio_path": "a.wav", "beam_size": 11},
        {"audio_path": "a.wav", "beam_size": "5"},
        {"audio_path": "a.wav", "beam_size": 5.0},
        {"audio_path": "a.wav", "beam_size": 5.5},
        {"audio_path": "a.wav", "beam_size": True},
        {"audio_path": "a.wav", "job_id": "current"},
        {"audio_path": "a.wav", "job_id": "currently"},
        {"audio_path": "a.wav", "initial_prompt": "x" * 65_536},
        {"audio_path": "a.wav", "hotwords": "x" * 65_537},
        {"audio_path": "a.wav", "language": "auto"},
        *({"audio_path": "a.wav", field: None} for field in JobRequest.model_fields),
        {"audio_path": "a.wav", "temperature": [0, 0.5]},
        {"audio_path": "a.wav", "temperature": []},
        {"audio_path": "a.wav", "clip_timestamps": [[0, 1, 2]]},
        {"audio_path": "a.wav", "clip_timestamps": [[0, 1]]},
        {"audio_path": "a.wav", "audio_track": 1},
        {"audio_path": "a.wav", "audio_track": 1.0},
        {"audio_path": "a.wav", "audio_track": -1},
        {"audio_path": "a.wav", "audio_track": "mix"},
        {"audio_path": "a.wav", "audio_track": "all"},
        {"audio_path": "a.wav", "formats": ["pdf"]},
        {"audio_path": "a.wav", "priority": 10},
        {"audio_path": "a.wav", "priority": 9},
        {"audio_path": "a.wav", "expires_in": 0},
        {"audio_path": "a.wav", "expires_in": 0.5},
        {"audio_path": "a.wav", "metadata": []},
        {},
        [],
    ],
)
def test_a_request_is_accepted_if_its_schema_allows_it(payload: Any) -> None:
    allowed = Draft202012Validator(payload_schemas()["JobRequest"]).is_valid(payload)
    assert allowed == isinstance(parse_submission(json.dumps(payload).encode()), Accepted)


@pytest.mark.parametrize(
    "line", ["a.wav", " a b.wav", "a.wav\n", "a.wav\r\n", "http://host/a.wav", "", " ", "a\nb", "a\0", '{"a', " [", '"']
)
def test_a_line_is_accepted_if_its_schema_allows_it(contract: Document, line: str) -> None:
    allowed = Draft7Validator(contract["components"]["messages"]["line"]["payload"]).is_valid(line)
    assert allowed == isinstance(parse_submission(line.encode()), Accepted)


def test_the_examples_of_requests_are_accepted(contract: Document) -> None:
    shown = examples()
    for example in (*(json.dumps(each) for each in shown["job"]), *shown["line"]):
        assert isinstance(parse_submission(example.encode()), Accepted), example
    for command in COMMANDS:
        short = contract["operations"][command]["messages"][1]["$ref"].rpartition("/")[2]
        for example in (*(json.dumps(each) for each in shown[message_name(command, "Request")]), *shown[short]):
            assert parse_command(command, example.encode()).command is not None, (command, example)


@pytest.mark.parametrize("validator", [Draft7Validator, Draft202012Validator])
def test_each_schema_is_complete_and_valid_in_old_and_new_drafts(validator: Any) -> None:
    schemas = payload_schemas()
    messages = default_document()["components"]["messages"]
    for name in schemas:
        alone = bundle(name, schemas)
        validator.check_schema(alone)
        shown = [
            example["payload"]
            for message in messages.values()
            if message.get("payload", {}).get("$ref") == f"#/components/schemas/{name}"
            for example in message["examples"]
        ]
        for example in shown:
            validator(alone).validate(example)
        assert not validator(alone).is_valid({"status": 1, "job_id": [], "settings": 2}), name


# -- the commands --------------------------------------------------------------------------------------------------


def test_the_command_prints_the_document_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "asyncapi", "--topic-prefix", "home/voice", "--broker", "mqtt://broker.lan"]) == ExitCode.OK
    contract = json.loads(capsys.readouterr().out)
    assert contract["components"]["parameters"]["prefix"]["default"] == "home/voice"
    assert contract["servers"]["broker"]["host"] == "broker.lan:1883"


def test_the_command_prints_all_schemas_as_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "json"]) == ExitCode.OK
    contract = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(contract)
    status = Draft202012Validator({**contract, "$ref": "#/$defs/Status"})
    for example in examples()["status"]:
        status.validate(example)
    assert not status.is_valid({})


def test_the_command_writes_a_file_for_each_payload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "schemas"
    assert run(["schema", "json", "--output", str(folder)]) == ExitCode.OK
    files = capsys.readouterr().out.splitlines()
    assert sorted(files) == sorted(str(folder / f"{name}.schema.json") for name in payload_schemas())
    alone = json.loads((folder / "ListResponse.schema.json").read_text())
    assert set(alone["$defs"]) == {"JobList", "Brief"}
    Draft7Validator(alone).validate(examples()["listResponse"][0])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(["schema", "json", "--output", str(tmp_path / "file" / "schemas")]) == ExitCode.FAILED
    assert capsys.readouterr().err == f"cesar-mqtt: {tmp_path}/file/schemas cannot be written: Not a directory.\n"


def test_printing_the_contract_loads_neither_a_model_nor_a_broker() -> None:
    program = (
        "import sys; from cesar_mqtt.cli.app import run; code = run(['schema', 'asyncapi']); "
        "heavy = {'faster_whisper', 'av', 'numpy', 'amqtt', 'tinydb'} & set(sys.modules); "
        "sys.exit(code or ' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stderr) == (0, "")
