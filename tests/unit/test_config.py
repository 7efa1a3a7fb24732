import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
from pydantic import ValidationError, field_validator, model_validator

from cesar_mqtt.config import LOCAL_BROKER, BrokerSettings, Section, Settings, _first_error, load_settings
from cesar_mqtt.config_sources import SettingValue
from cesar_mqtt.errors import ConfigError

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads settings as a user of an otherwise empty machine would, started in `tmp_path`/cwd."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "site"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def load_from(
        *,
        toml: str | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
        config_file: Path | None = None,
        **options: Any,
    ) -> Settings:
        if toml is not None:
            (cwd / "cesar.toml").write_text(toml, encoding="utf-8")
        return load_settings(flags=flags or {}, config_file=config_file, environ=environ or {}, cwd=cwd, **options)

    return load_from


def refusal(load: Load, **sources: Any) -> str:
    """Loads what must be refused and gives the message."""
    with pytest.raises(ConfigError) as caught:
        load(**sources)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_in_a_systemd_unit_the_data_directory_is_its_first_state_directory(load: Load) -> None:
    unit = {"STATE_DIRECTORY": "/var/lib/cesar-mqtt:/var/lib/other"}
    assert load(environ=unit).data_dir == Path("/var/lib/cesar-mqtt")
    assert load(environ={**unit, "CESAR_DATA_DIR": "/srv/cesar"}).data_dir == Path("/srv/cesar")


def test_with_nothing_set_the_defaults_apply(load: Load, tmp_path: Path) -> None:
    settings = load()
    assert settings.topic_prefix == "cesar"
    assert settings.data_dir == tmp_path / "data" / "cesar-mqtt"
    assert settings.broker == BrokerSettings()


def test_flags_win_over_the_environment_which_wins_over_the_file(load: Load) -> None:
    toml = 'topic_prefix = "file"\n[consumer]\nname = "file"\n[broker]\nusername = "file"\nkeepalive = 60\n'
    environ = {"CESAR_TOPIC_PREFIX": "environment", "CESAR_CONSUMER__NAME": "environment"}
    settings = load(toml=toml, environ=environ, flags={"topic_prefix": "flag"})
    assert settings.topic_prefix == "flag"
    assert settings.consumer.name == "environment"
    assert (settings.broker.username, settings.broker.keepalive) == ("file", 60)


def test_a_value_that_a_flag_overrides_may_be_wrong(load: Load) -> None:
    assert load(toml="[broker]\nkeepalive = 1\n", environ={"CESAR_BROKER__KEEPALIVE": "7"}).broker.keepalive == 7


def test_flags_that_were_not_given_do_not_hide_other_sources(load: Load) -> None:
    flags: dict[str, Any] = {"topic_prefix": None, "broker": {"url": None}, "audio": {"directories": []}, "models": {}}
    settings = load(toml='topic_prefix = "p"\n[audio]\ndirectories = ["/a"]\n', flags=flags)
    assert settings.topic_prefix == "p"
    assert settings.audio.directories == (Path("/a"),)


def test_only_the_first_file_found_is_read(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "site/cesar-mqtt/cesar.toml", 'topic_prefix = "site"\n[consumer]\nname = "site"\n')
    assert load().topic_prefix == "site"
    write(tmp_path / "user/cesar-mqtt/cesar.toml", 'topic_prefix = "user"')
    assert (load().topic_prefix, load().consumer.name) == ("user", "cesar")
    assert load(toml='topic_prefix = "here"').topic_prefix == "here"
    assert load(toml="").topic_prefix == "cesar", "an empty file is a file"
    chosen = write(tmp_path / "chosen.toml", 'topic_prefix = "chosen"')
    assert load(config_file=chosen).topic_prefix == "chosen"
    assert load(config_file=Path("../chosen.toml")).topic_prefix == "chosen"
    write(tmp_path / "home/mine.toml", 'topic_prefix = "mine"')
    assert load(config_file=Path("~/mine.toml")).topic_prefix == "mine"


def test_a_dotenv_file_is_never_read(load: Load, tmp_path: Path) -> None:
    write(tmp_path / "cwd/.env", "CESAR_TOPIC_PREFIX=dotenv\n")
    assert load().topic_prefix == "cesar"


def test_an_empty_variable_counts_as_not_set(load: Load) -> None:
    assert load(toml='topic_prefix = "file"', environ={"CESAR_TOPIC_PREFIX": ""}).topic_prefix == "file"


def test_variables_of_other_programs_are_left_alone(load: Load) -> None:
    assert load(environ={"CESARX": "1", "MQTT_CESAR_URL": "x", "cesar_url": "x"}) == load()


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CESAR_TOPIC_PREFIX", "real")
    assert load_settings(flags={}, config_file=None, cwd=tmp_path).topic_prefix == "real"


def test_without_a_setting_serve_has_its_own_broker_and_clients_use_the_local_one(load: Load) -> None:
    assert load().broker.url == "embedded"
    assert load(default_broker=LOCAL_BROKER).broker.url == "mqtt://127.0.0.1:1883"
    toml = '[broker]\nurl = "mqtt://hub"\nkeepalive = 9\n'
    assert load(toml=toml, default_broker=LOCAL_BROKER).broker == BrokerSettings(url="mqtt://hub", keepalive=9)


@pytest.mark.parametrize("text", ["/a:b: ~/c", '["/a", "b", "~/c"]'], ids=["path list", "JSON"])
def test_a_list_of_paths_in_a_variable(load: Load, tmp_path: Path, text: str) -> None:
    directories = load(environ={"CESAR_AUDIO__DIRECTORIES": text}).audio.directories
    assert directories == (Path("/a"), tmp_path / "cwd/b", tmp_path / "home/c")


@pytest.mark.parametrize("text", ["tiny.en, base", '["tiny.en", "base"]'], ids=["commas", "JSON"])
def test_a_list_of_names_in_a_variable(load: Load, text: str) -> None:
    assert load(environ={"CESAR_MODELS__ALLOWED": text}).models.allowed == ("tiny.en", "base")


@pytest.mark.parametrize("topic_filter", ["answers/#", "+/answers/+", "#", "/a", "a/+/b", "a//b"])
def test_topic_filters(load: Load, topic_filter: str) -> None:
    assert load(environ={"CESAR_SECURITY__RESPONSE_TOPICS": topic_filter}).security.response_topics == (topic_filter,)


@pytest.mark.parametrize("topic_filter", ["", "a#", "#/a", "a+/b", "a/b+", "a/##"])
def test_what_is_no_topic_filter_is_refused(load: Load, topic_filter: str) -> None:
    message = refusal(load, toml=f"[security]\nresponse_topics = ['a', '{topic_filter}']\n")
    assert message.startswith("security.response_topics in cesar.toml is")


def test_numbers_and_booleans_in_variables(load: Load) -> None:
    environ = {"CESAR_MODELS__DOWNLOAD": "false", "CESAR_WORKER__DRAIN_TIMEOUT": "1.5", "CESAR_QUEUE__MAX_QUEUED": "5"}
    settings = load(environ=environ)
    assert settings.models.download is False
    assert settings.worker.drain_timeout == 1.5
    assert settings.queue.max_queued == 5


def test_a_relative_path_starts_from_its_file_or_else_from_the_current_folder(load: Load, tmp_path: Path) -> None:
    config = write(tmp_path / "etc/cesar.toml", 'data_dir = "state"\n[broker]\nca_file = "ca.pem"\n')
    settings = load(
        config_file=config, environ={"CESAR_MODELS__DIRECTORY": "models"}, flags={"audio": {"directories": ["a"]}}
    )
    assert settings.data_dir == tmp_path / "etc/state"
    assert settings.broker.ca_file == tmp_path / "etc/ca.pem"
    assert settings.models.directory == tmp_path / "cwd/models"
    assert settings.audio.directories == (tmp_path / "cwd/a",)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[broker]\nkeepalive = 'abc'",
            "broker.keepalive in cesar.toml is 'abc': it must be a whole number from 5 to 3600",
        ),
        ("[broker]\nkeepalive = 4", "broker.keepalive in cesar.toml is 4: it must be a whole number from 5 to 3600"),
        ("[broker]\nprotocol = '4'", "broker.protocol in cesar.toml is '4': it must be auto, 5 or 3.1.1"),
        ("[queue]\nmax_priority = 10", "queue.max_priority in cesar.toml is 10: it must be a whole number from 0 to 9"),
        ("[queue]\nmax_queued = true", "queue.max_queued in cesar.toml is true: it must be a whole number, 1 or more"),
        ("[audio]\nmax_duration = inf", "audio.max_duration in cesar.toml is inf: it must be a number above 0"),
        ("[audio]\ndirectories = '/a'", "audio.directories in cesar.toml is '/a': it must be a list of paths"),
        (
            "[audio]\ndirectories = ['/a', 1]",
            "audio.directories in cesar.toml is ['/a', 1]: it must be a list of paths",
        ),
        ("[models]\nallowed = [1]", "models.allowed in cesar.toml is [1]: it must be a list of texts"),
        ("[models]\ndownload = 'maybe'", "models.download in cesar.toml is 'maybe': it must be true or false"),
        ("[models]\ndirectory = ''", "models.directory in cesar.toml is '': it must be a path"),
        ('data_dir = "a\\u0000"', "data_dir in cesar.toml is 'a\\x00': it must be a path"),
        ("data_dir = 1", "data_dir in cesar.toml is 1: it must be a path"),
        ("data_dir = {a = 1}", "data_dir.a in cesar.toml: there is no such setting; did you mean data_dir?"),
        (
            "[consumer]\nname = 'a/b'",
            "consumer.name in cesar.toml is 'a/b': it must be 1 to 64 letters, digits, underscores or hyphens",
        ),
    ],
)
def test_a_wrong_value_in_the_file_is_named_and_explained(load: Load, toml: str, message: str) -> None:
    assert refusal(load, toml=toml) == message


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[broker]\nurll = 'x'", "broker.urll in cesar.toml: there is no such setting; did you mean broker.url?"),
        ("[borker]\nurl = 'x'", "borker.url in cesar.toml: there is no such setting; did you mean broker.url?"),
        ("url = 'x'", "url in cesar.toml: there is no such setting; did you mean broker.url?"),
        ("topic-prefix = 'x'", "topic-prefix in cesar.toml: there is no such setting; did you mean topic_prefix?"),
        ("[qwertz]", "qwertz in cesar.toml: there is no such setting"),
        ("[broker.tls]\nca = 'x'", "broker.tls in cesar.toml: there is no such setting"),
        (
            "broker = 'mqtt://u:secret@h'",
            "broker in cesar.toml: this is a section of settings; set one of them, such as broker.url",
        ),
    ],
)
def test_an_unknown_name_in_the_file_stops_the_start_with_a_suggestion(load: Load, toml: str, message: str) -> None:
    assert refusal(load, toml=toml).startswith(message)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("CESAR_BROKER__URl", "CESAR_BROKER__URl: there is no such setting; did you mean CESAR_BROKER__URL?"),
        ("CESAR_broker__url", "CESAR_broker__url: there is no such setting; did you mean CESAR_BROKER__URL?"),
        ("CESAR_BROKER__", "CESAR_BROKER__: there is no such setting"),
        ("CESAR_QUEUE__ZZZ__Y", "CESAR_QUEUE__ZZZ__Y: there is no such setting"),
    ],
)
def test_an_unknown_variable_of_a_section_stops_the_start_with_a_suggestion(
    load: Load, variable: str, message: str
) -> None:
    assert refusal(load, environ={variable: "mqtt://user:secret@host"}).startswith(message)


@pytest.mark.parametrize(
    ("variable", "warning"),
    [
        (
            "CESAR_PORT",
            "Ignoring CESAR_PORT: there is no such setting; did you mean CESAR_METRICS__PORT?",
        ),
        ("CESAR_PORT_1883_TCP_ADDR", "Ignoring CESAR_PORT_1883_TCP_ADDR: there is no such setting"),
        (
            "CESAR_BROKR__URL",
            "Ignoring CESAR_BROKR__URL: there is no such setting; did you mean CESAR_BROKER__URL?",
        ),
        (
            "CESAR_BROKER_URL",
            "Ignoring CESAR_BROKER_URL: there is no such setting; did you mean CESAR_BROKER__URL?",
        ),
        (
            "CESAR_BROKER",
            "Ignoring CESAR_BROKER: this is a section of settings; set one of them, such as CESAR_BROKER__URL",
        ),
        ("CESAR_", "Ignoring CESAR_: there is no such setting"),
    ],
)
def test_any_other_unknown_variable_is_ignored_with_a_warning(load: Load, variable: str, warning: str) -> None:
    """Kubernetes injects such variables for a service of this name."""
    warnings: list[str] = []
    environ = {variable: "mqtt://user:secret@host", "CESAR_TOPIC_PREFIX": "still-read"}
    assert load(environ=environ, on_warning=warnings.append).topic_prefix == "still-read"
    assert warnings == [warning]


def test_a_wrong_value_in_a_variable_or_a_flag_is_named_as_it_was_written(load: Load) -> None:
    assert refusal(load, environ={"CESAR_LOG__LEVEL": "loud"}) == (
        "CESAR_LOG__LEVEL is 'loud': it must be debug, info, warning or error"
    )
    assert refusal(load, environ={"CESAR_AUDIO__DIRECTORIES": '["/a'}) == (
        "CESAR_AUDIO__DIRECTORIES is '[\"/a': it must be a list of paths"
    )
    assert refusal(load, flags={"consumer": {"name": "a b"}}).startswith("--name is 'a b': it must be 1 to 64")
    assert refusal(load, flags={"queue": {"max_queued": 0}}).startswith("queue.max_queued on the command line is 0")


@pytest.mark.parametrize("prefix", ["a", "home/cesar-1", "A_b/c/d"])
def test_a_topic_prefix_may_have_levels(load: Load, prefix: str) -> None:
    assert load(flags={"topic_prefix": prefix}).topic_prefix == prefix


@pytest.mark.parametrize("prefix", ["/a", "a/", "a//b", "a/+", "#", "$SYS/a", "a b", "é", "a\nb", "a/b\n/"])
def test_a_topic_prefix_that_would_break_topics_is_refused(load: Load, prefix: str) -> None:
    assert "must be topic levels of letters" in refusal(load, flags={"topic_prefix": prefix})


def test_a_file_that_was_asked_for_has_to_exist(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert refusal(load, config_file=path) == f"{path} cannot be read: there is no such file"


def test_a_file_that_cannot_be_read_stops_the_start_instead_of_being_passed_over(load: Load, tmp_path: Path) -> None:
    (tmp_path / "cwd/cesar.toml").mkdir()
    assert refusal(load) == "cesar.toml cannot be read: Is a directory"


def test_malformed_toml_is_refused_with_the_place(load: Load) -> None:
    assert (
        refusal(load, toml="[broker]\nurl = mqtt://x\n")
        == "cesar.toml is not valid TOML: Invalid value (at line 2, column 7)"
    )


def test_a_file_that_is_not_utf8_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "cwd/cesar.toml").write_bytes(b'topic_prefix = "\xff"\n')
    assert refusal(load) == "cesar.toml cannot be read: it is not UTF-8 text"


def test_an_unknown_home_folder_is_refused(load: Load) -> None:
    assert refusal(load, environ={"CESAR_DATA_DIR": "~no-such-user-here/x"}) == (
        "CESAR_DATA_DIR is '~no-such-user-here/x': there is no such home folder"
    )


def test_a_wrong_broker_url_is_refused_without_being_shown(load: Load) -> None:
    message = refusal(load, toml="[broker]\nurl = ['mqtt://user:secret@host']\n")
    assert message == "broker.url in cesar.toml: it must be text"


def test_the_password_in_the_url_shows_in_no_representation(load: Load) -> None:
    settings = load(flags={"broker": {"url": "mqtt://user:secret@host"}})
    assert "secret" not in repr(settings)
    assert "secret" not in str(settings)
    with pytest.raises(ValidationError) as caught:
        BrokerSettings.model_validate({"url": ["mqtt://user:secret@host"]})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "published"),
    [
        ("embedded", "embedded"),
        ("mqtt://host", "mqtt://host"),
        ("embedded://127.0.0.1:1999", "embedded://127.0.0.1:1999"),
        ("mqtt://user:secret@host:1883", "mqtt://***@host:1883"),
        ("mqtt://secret@host", "mqtt://***@host"),
        ("wss://user:se/c:r?e#t@cret@[::1]:8084/mqtt", "wss://***@[::1]:8084/mqtt"),
        ("wss://host/mqtt?token=secret", "***"),
        ("wss://host/mqtt#secret", "***"),
        ("mqtt://user:secret", "***"),
        ("user:secret@host", "***"),
        ("mqtt://user:secret@", "***"),
    ],
)
def test_published_settings_hold_no_credentials(load: Load, url: str, published: str) -> None:
    settings = load(flags={"broker": {"url": url, "username": "secret"}})
    values = settings.redacted()
    assert values["broker"]["url"] == published
    assert "secret" not in json.dumps(values)


def test_published_settings_are_json_and_otherwise_complete(load: Load) -> None:
    settings = load(flags={"audio": {"directories": ["/a"]}})
    values = json.loads(json.dumps(settings.redacted()))
    assert Settings.model_validate(values) == settings


def test_settings_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().broker.keepalive = 5  # type: ignore[misc]


def test_importing_the_settings_imports_nothing_heavy() -> None:
    script = "import sys, cesar_mqtt.config; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    heavy = {"amqtt", "av", "dotenv", "faster_whisper", "numpy", "paho", "pydantic_settings"}
    assert heavy.isdisjoint(done.stdout.split())


def test_a_rule_between_settings_is_told_in_its_own_words() -> None:
    class Pair(Section):
        low: int = 0
        high: int = 0

        @field_validator("high")
        @classmethod
        def _even(cls, value: int) -> int:
            if value % 2:
                raise ValueError("it must be even")
            return value

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.low > self.high:
                raise ValueError("low must not be above high")
            return self

    said = {"high": SettingValue(3, "CESAR_HIGH", "3")}
    for values, message in [
        ({"high": 3}, "CESAR_HIGH: it must be even"),
        ({"low": 1}, "the settings: low must not be above high"),
    ]:
        with pytest.raises(ValidationError) as caught:
            Pair.model_validate(values)
        assert str(_first_error(caught.value, said)) == message
