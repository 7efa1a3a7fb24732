"""The contract as data: the AsyncAPI document, the JSON Schemas, and the commands that print them."""

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
from cesar_mqtt.errors import ErrorCode, ExitCode
from cesar_mqtt.mqtt.broker_url import parse_broker_url
from cesar_mqtt.protocol.asyncapi import document
from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.examples import examples
from cesar_mqtt.protocol.fields import Payload
from cesar_mqtt.protocol.parsing import Accepted, parse_command, parse_submission
from cesar_mqtt.protocol.schema import MODELS, NAMES, READ, bundle, payload_schemas
from tests.document import OFFICIAL, default_document, faults, resolve

Document = dict[str, Any]

# The contract, typed by hand and in its order.
AUDIO = ["audio_path", "audio_url", "audio_base64"]
REQUEST = [
    *AUDIO,
    "job_id",
    "model_size",
    "language",
    "task",
    "initial_prompt",
    "hotwords",
    "beam_size",
    "temperature",
    "vad_filter",
    "word_timestamps",
    "clip_timestamps",
    "batch_size",
    "formats",
    "stream",
    "expires_in",
    "metadata",
]
STATUS = [
    "job_id",
    "status",
    "attempt",
    "created_at",
    "started_at",
    "completed_at",
    "updated_at",
    "queue_position",
    "progress",
    "processed_duration",
    "audio_duration",
    "speed",
    "eta",
    "audio_source",
    "model_size",
    "language",
    "task",
    "result_text",
    "detected_language",
    "language_probability",
    "no_speech",
    "error_code",
    "error_message",
    "retryable",
    "warnings",
    "formats",
    "result_truncated",
    "metadata",
    "consumer",
    "version",
]
SEGMENT = ["id", "start", "end", "text", "avg_logprob", "no_speech_prob", "words"]
PAYLOAD_FIELDS = {
    "JobRequest": REQUEST,
    "Answer": ["job_id", "status"],
    "Status": STATUS,
    "Segment": ["job_id", *SEGMENT],
    "TimedSegment": SEGMENT,
    "Failure": ["status", "data", "error", "transaction"],
    "Rejection": ["reason", "detail", "topic", "job_id", "payload_excerpt", "received_at"],
    "ConsumerState": ["state"],
    "Queue": [
        "activity",
        "job_id",
        "queued",
        "oldest_age",
        "paused",
        "completed_total",
        "error_total",
        "cancelled_total",
        "rejected_total",
        "deleted_total",  # an addition: what the broker retains tells of deletions, too
    ],
    "Last": ["job_id", "status", "text", "text_truncated", "language", "audio_duration", "completed_at"],
    "Health": [
        "uptime",
        "worker_alive",
        "network_alive",
        "ledger_bytes",
        "rss_bytes",
        "spool_bytes",
        "disk_free_bytes",
    ],
}
AT_LEAST = {
    "Event": ["event_type", "job_id"],
    "Info": ["version", "models", "device", "compute_type", "limits", "broker", "started_at", "settings"],
    "JobCommand": ["job_id", "transaction"],
    "ResultCommand": ["job_id", "format", "offset", "length", "transaction"],
    "ListCommand": ["status", "limit", "after", "transaction"],
}
STATES = ["queued", "processing", "completed", "error", "cancelled"]
VALUES = {
    ("Status", "status"): STATES,
    ("Event", "event_type"): [*STATES, "deleted"],
    ("Rejection", "reason"): [
        "malformed_json",
        "invalid_request",
        "invalid_job_id",
        "job_id_conflict",
        "payload_too_large",
        "queue_full",
        "unknown_command",
    ],
    ("ConsumerState", "state"): ["online", "offline"],
    ("Queue", "activity"): ["starting", "loading", "idle", "processing", "paused", "draining", "degraded"],
}
CODES = [
    "invalid_request",
    "audio_not_found",
    "audio_not_allowed",
    "audio_unreadable",
    "audio_no_stream",
    "audio_empty",
    "audio_too_large",
    "audio_too_long",
    "download_failed",
    "model_unavailable",
    "timeout",
    "expired",
    "crashed",
    "internal",
]
TOPICS = {  # where, whether the consumer sends, whether it is retained
    "{prefix}/jobs": (False, False),
    "{prefix}/audio/{job_id}": (False, False),
    "{prefix}/status/{job_id}": (True, True),
    "{prefix}/result/{job_id}/{format}": (True, True),
    "{prefix}/segments/{job_id}": (True, False),
    "{prefix}/events": (True, False),
    "{prefix}/request/{command}": (False, False),
    "{prefix}/response/{command}": (True, False),
    "{prefix}/rejected": (True, False),
    "{prefix}/consumer/{consumer}/state": (True, True),
    "{prefix}/consumer/{consumer}/queue": (True, True),
    "{prefix}/consumer/{consumer}/last": (True, True),
    "{prefix}/consumer/{consumer}/info": (True, True),
    "{prefix}/consumer/{consumer}/health": (True, True),
}
CONTROL = ["cancel", "retry", "delete", "get", "result", "list", "pause", "resume", "health", "models"]


@pytest.fixture
def told() -> Document:
    return copy.deepcopy(default_document())


@pytest.fixture(scope="module")
def official() -> Draft7Validator:
    return Draft7Validator(json.loads(OFFICIAL.read_text()))


def fields(name: str) -> list[str]:
    return list(payload_schemas()[name]["properties"])


# -- the document --------------------------------------------------------------------------------------------------


def test_the_official_schema_has_nothing_to_say_of_the_document(told: Document, official: Draft7Validator) -> None:
    assert [error.json_path for error in official.iter_errors(told)] == []


def test_the_official_schema_would_find_what_is_no_asyncapi(told: Document, official: Draft7Validator) -> None:
    told["operations"]["takeJob"]["action"] = "publish"
    assert not official.is_valid(told)


def test_what_the_official_schema_does_not_find_is_right_as_well(told: Document) -> None:
    assert faults(told) == []


def _dangle(told: Document) -> None:
    del told["components"]["schemas"]["Word"]


def _undeclare(told: Document) -> None:
    del told["channels"]["results"]["parameters"]["format"]


def _invalidate(told: Document) -> None:
    told["components"]["messages"]["status"]["examples"][0]["payload"]["progress"] = "half"


def _add(told: Document) -> None:
    told["components"]["messages"]["status"]["examples"][0]["payload"]["mood"] = "good"


def _stray(told: Document) -> None:
    told["operations"]["takeJob"]["messages"].append({"$ref": "#/channels/statuses/messages/status"})


def _forget(told: Document) -> None:
    told["operations"]["takeJob"]["messages"].pop()


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (_dangle, "#/components/schemas/Word leads nowhere"),
        (_undeclare, "channel results has ['format', 'job_id', 'prefix'] in its address and declares"),
        (_invalidate, "example 0 of status: $.progress: "),
        (_add, "example 0 of status: $: Additional properties"),
        (_stray, "operation takeJob speaks of #/channels/statuses/messages/status, which is not of its channel"),
        (_forget, "no operation speaks of message line of channel jobs"),
    ],
)
def test_a_fault_that_the_official_schema_does_not_find_is_found_here(
    told: Document, official: Draft7Validator, spoil: Callable[[Document], None], found: str
) -> None:
    spoil(told)
    assert official.is_valid(told)
    assert [fault[: len(found)] for fault in faults(told)] == [found]


def test_the_topics_are_those_of_the_contract_with_their_retention(told: Document) -> None:
    found = {}
    for operation in told["operations"].values():
        address = resolve(told, operation["channel"]["$ref"])["address"]
        binding = operation["bindings"]["mqtt"]
        assert (binding["qos"], binding["bindingVersion"]) == (1, "0.2.0")
        found[address] = (operation["action"] == "send", binding["retain"])
    assert found.pop(None) == (True, False), "the Response Topic of a request"
    assert found == TOPICS


def test_each_command_has_an_operation_with_its_answer(told: Document) -> None:
    assert list(COMMANDS) == CONTROL
    for command in CONTROL:
        operation = told["operations"][command]
        assert operation["messages"][0]["$ref"] == f"#/channels/requests/messages/{command}Request"
        assert operation["reply"]["messages"] == [{"$ref": f"#/channels/responses/messages/{command}Response"}]


def test_the_document_tells_of_this_consumer_and_keeps_its_secrets() -> None:
    broker = BrokerSettings(url="wss://user:hunter2@broker.lan/mqtt?token=hunter2")
    settings = Settings(topic_prefix="home/voice", consumer=ConsumerSettings(name="attic"), broker=broker)
    told = document(settings, parse_broker_url(broker.url))
    server = told["servers"]["broker"]
    assert (server["host"], server["pathname"], server["protocol"]) == ("broker.lan:443", "/mqtt", "wss")
    assert server["bindings"]["mqtt"]["lastWill"]["topic"] == "home/voice/consumer/attic/state"
    parameters = told["components"]["parameters"]
    assert (parameters["prefix"]["default"], parameters["consumer"]["default"]) == ("home/voice", "attic")
    assert "hunter2" not in json.dumps(told)


def test_the_user_properties_of_an_audio_file_cannot_name_another_one(told: Document) -> None:
    schemas = told["components"]["schemas"]
    assert sorted(schemas["JobProperties"]["properties"]) == sorted(REQUEST)
    assert sorted(schemas["AudioProperties"]["properties"]) == sorted(set(REQUEST) - set(AUDIO))


# -- the payloads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAYLOAD_FIELDS)
def test_a_payload_has_the_fields_of_the_contract_and_no_others(name: str) -> None:
    assert sorted(fields(name)) == sorted(PAYLOAD_FIELDS[name])


@pytest.mark.parametrize("name", AT_LEAST)
def test_a_payload_has_at_least_the_fields_of_the_contract(name: str) -> None:
    assert set(AT_LEAST[name]) <= set(fields(name))


@pytest.mark.parametrize(("name", "field"), VALUES)
def test_a_field_has_the_values_of_the_contract(name: str, field: str) -> None:
    assert payload_schemas()[name]["properties"][field]["enum"] == VALUES[name, field]


def test_the_error_codes_are_those_of_the_contract() -> None:
    for name in ("Status", "Event", "Brief"):
        kinds = payload_schemas()[name]["properties"]["error_code"]["anyOf"]
        assert kinds == [{"type": "string", "enum": CODES}, {"type": "null"}]
    assert [code.value for code in ErrorCode] == CODES


def test_a_response_is_an_answer_with_data_or_an_error_without() -> None:
    for command, kind in COMMANDS.items():
        done, failed = payload_schemas()[f"{command.title()}Response"]["oneOf"]
        assert list(done["properties"]) == done["required"] == PAYLOAD_FIELDS["Failure"]
        assert done["properties"]["data"] == {"$ref": f"#/$defs/{NAMES[kind.data]}"}
        assert list(failed["properties"]["data"]["properties"]) == ["consumer"]


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


def test_what_is_taken_is_closed_and_what_is_said_may_get_more_fields() -> None:
    schemas = payload_schemas()
    closed = {name for name, schema in schemas.items() if schema.get("additionalProperties") is False}
    assert closed == {"JobRequest", "Command", "JobCommand", "ListCommand", "ResultCommand"}


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
        *({"audio_path": "a.wav", field: None} for field in REQUEST),
        {"audio_path": "a.wav", "temperature": [0, 0.5]},
        {"audio_path": "a.wav", "temperature": []},
        {"audio_path": "a.wav", "clip_timestamps": [[0, 1, 2]]},
        {"audio_path": "a.wav", "clip_timestamps": [[0, 1]]},
        {"audio_path": "a.wav", "formats": ["pdf"]},
        {"audio_path": "a.wav", "expires_in": 0},
        {"audio_path": "a.wav", "expires_in": 0.5},
        {"audio_path": "a.wav", "metadata": []},
        {},
        [],
    ],
)
def test_what_the_schema_of_a_request_allows_is_what_the_consumer_takes(payload: Any) -> None:
    allowed = Draft202012Validator(payload_schemas()["JobRequest"]).is_valid(payload)
    assert allowed == isinstance(parse_submission(json.dumps(payload).encode()), Accepted)


@pytest.mark.parametrize(
    "line", ["a.wav", " a b.wav", "a.wav\n", "a.wav\r\n", "http://host/a.wav", "", " ", "a\nb", "a\0", '{"a', " [", '"']
)
def test_what_the_schema_of_a_line_allows_is_what_the_consumer_takes(told: Document, line: str) -> None:
    allowed = Draft7Validator(told["components"]["messages"]["line"]["payload"]).is_valid(line)
    assert allowed == isinstance(parse_submission(line.encode()), Accepted)


def test_the_examples_of_requests_are_taken(told: Document) -> None:
    shown = examples()
    for example in (*(json.dumps(each) for each in shown["job"]), *shown["line"]):
        assert isinstance(parse_submission(example.encode()), Accepted), example
    for command in COMMANDS:
        short = told["operations"][command]["messages"][1]["$ref"].rpartition("/")[2]
        for example in (*(json.dumps(each) for each in shown[f"{command}Request"]), *shown[short]):
            assert parse_command(command, example.encode()).command is not None, (command, example)


@pytest.mark.parametrize("validator", [Draft7Validator, Draft202012Validator])
def test_each_schema_stands_for_itself_in_old_and_new_drafts(validator: Any) -> None:
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
    told = json.loads(capsys.readouterr().out)
    assert told["components"]["parameters"]["prefix"]["default"] == "home/voice"
    assert told["servers"]["broker"]["host"] == "broker.lan:1883"


def test_the_command_prints_all_schemas_as_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "json"]) == ExitCode.OK
    told = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(told)
    status = Draft202012Validator({**told, "$ref": "#/$defs/Status"})
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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
