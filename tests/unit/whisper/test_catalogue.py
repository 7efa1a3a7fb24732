import hashlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from faster_whisper import available_models
from huggingface_hub import constants

from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import Cancelled, ConfigError, ErrorCode, JobFailedError
from cesar_mqtt.whisper import catalogue as catalogue_module
from cesar_mqtt.whisper.catalogue import Catalogue, Place
from cesar_mqtt.whisper.packages import Package, PackagedModels
from tests.unit.whisper.fake_hub import FakeHub, point_to, running_hub

FILES = ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a hub that refuses connections, whatever this machine has and can reach."""
    cache = tmp_path / "hub"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{unused.getsockname()[1]}", cache, monkeypatch)
    return cache


@pytest.fixture
def fake_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as fake:
        point_to(fake.endpoint, hub_cache, monkeypatch)
        yield fake


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def look(settings: ModelSettings, *, packages: PackagedModels | None = None) -> Catalogue:
    """A catalogue of a machine without packages, unless they are given."""
    return Catalogue(settings, packages=packages or PackagedModels(Path("/nowhere"), packages={}))


def make_model(folder: Path, name: str, *, without: str = "", words: int = 3) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    for file in FILES:
        if file != without:
            (path / file).write_text("word\n" * words if file == "vocabulary.txt" else '{"model": {}}')
    return path


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModels:
    """Two installed packages: `tiny.en` whole, and `base` in one part."""
    site = tmp_path / "site"
    files = make_model(site / "catalogue_tiny", "model")
    make_model(site / "catalogue_base", "data")
    digests = {file: hashlib.sha256((files / file).read_bytes()).hexdigest() for file in FILES}
    monkeypatch.syspath_prepend(site)
    known = {
        "base": Package(
            "catalogue_base",
            "data",
            digests,
            parts=(("catalogue_base", "data/model.bin"),),
            size_bytes=13,
        ),
        "tiny.en": Package("catalogue_tiny", "model", digests),
    }
    return PackagedModels(tmp_path / "joined", packages=known)


def refusal(catalogue: Catalogue, name: str) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        catalogue.obtain(name)
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    return caught.value


# --- names


def test_by_default_every_model_that_is_known_and_every_folder_is_allowed(folder: Path) -> None:
    make_model(folder, "our-own")
    (folder / "no-model").mkdir()
    catalogue = look(ModelSettings(directory=folder))
    assert set(catalogue.allowed_names()) == {*available_models(), "our-own"}
    assert catalogue.is_allowed("large-v3")
    assert catalogue.is_allowed("turbo")
    assert catalogue.is_allowed("our-own")
    assert not catalogue.is_allowed("no-model")


@pytest.mark.parametrize(
    "name",
    ["../models/real", "/etc", "a/b", "..", ".", "", ".hidden", "real/", "real\0", "Systran/faster-whisper-tiny"],
)
@pytest.mark.usefixtures("no_network")
def test_a_name_is_never_a_path(name: str, folder: Path) -> None:
    make_model(folder, "real")
    make_model(folder, ".hidden")
    catalogue = look(ModelSettings(directory=folder))
    assert not catalogue.is_allowed(name)
    assert repr(name) in refusal(catalogue, name).message


def test_a_list_of_allowed_names_is_the_whole_list(folder: Path) -> None:
    make_model(folder, "our-own")
    catalogue = look(ModelSettings(directory=folder, allowed=("tiny", "large-v3")))
    assert catalogue.allowed_names() == ("tiny", "large-v3")
    assert not catalogue.is_allowed("our-own")
    assert not catalogue.is_allowed("base")
    assert catalogue.is_allowed("large")  # the same model under its other name


def test_a_model_that_is_no_longer_allowed_is_not_used(folder: Path) -> None:
    make_model(folder, "our-own")
    catalogue = look(ModelSettings(directory=folder, allowed=("tiny",)))
    assert "models.allowed" in refusal(catalogue, "our-own").message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ModelSettings(allowed=("tiny", "bsae")), ["models.allowed", "'bsae'"]),
        (ModelSettings(allowed=("../tiny",)), ["models.allowed", "'../tiny'"]),
        (ModelSettings(allowed=()), ["models.allowed", "empty"]),
        (ModelSettings(default="medum"), ["models.default", "'medum'", "did you mean 'medium'?", "tiny.en, tiny, "]),
        (ModelSettings(allowed=("smal",)), ["models.allowed", "'smal'", "did you mean 'small'?"]),
        (ModelSettings(default="base", allowed=("tiny", "small")), ["models.default", "'base'", "tiny, small"]),
        (ModelSettings(directory=Path("/nowhere/at/all")), ["models.directory", "/nowhere/at/all"]),
    ],
)
def test_an_impossible_setting_is_rejected_by_name_at_the_start(settings: ModelSettings, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        look(settings)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smal", "small"),
        ("Base", "base"),
        ("large_v3", "large-v3"),
        ("Large V3 Turbo", "large-v3-turbo"),
        ("openai/whisper-small", "small"),
        ("Systran/faster-whisper-base.en", "base.en"),
        ("our_own", "our-own"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest_name_and_the_list(name: str, meant: str, folder: Path) -> None:
    make_model(folder, "our-own")
    answer = look(ModelSettings(directory=folder)).explain_unknown(name)
    names = ", ".join((*available_models(), "our-own"))
    assert answer == f"there is no model {name!r} (did you mean {meant!r}?): use one of {names}"


def test_a_model_that_resembles_none_is_answered_with_the_allowed_ones() -> None:
    catalogue = look(ModelSettings(allowed=("tiny", "small")))
    assert catalogue.explain_unknown("parakeet") == "'parakeet' is not in models.allowed: use one of tiny, small"
    assert len(catalogue.explain_unknown("x" * 200)) < 200


# --- the default


def test_the_default_is_that_of_the_setting(folder: Path) -> None:
    make_model(folder, "base")
    assert look(ModelSettings(directory=folder, default="small")).default_name() == "small"


def test_the_default_is_base_if_it_is_on_this_machine_else_an_installed_package(
    folder: Path, packages: PackagedModels, tmp_path: Path
) -> None:
    assert look(ModelSettings(), packages=packages).default_name() == "base", "installed, if not joined"
    shutil.rmtree(tmp_path / "site" / "catalogue_base" / "data")
    assert look(ModelSettings(), packages=packages).default_name() == "tiny.en"
    make_model(folder, "base")
    assert look(ModelSettings(directory=folder), packages=packages).default_name() == "base"


def test_the_default_is_base_to_be_fetched_where_there_is_nothing() -> None:
    assert look(ModelSettings()).default_name() == "base"


def test_the_default_is_a_folder_where_there_is_nothing_else(folder: Path) -> None:
    make_model(folder, "our-own")
    assert look(ModelSettings(directory=folder)).default_name() == "our-own"


def test_the_default_is_an_allowed_one_that_is_here_else_the_first_allowed(folder: Path) -> None:
    make_model(folder, "medium")
    assert look(ModelSettings(allowed=("small", "medium"), directory=folder)).default_name() == "medium"
    assert look(ModelSettings(allowed=("small", "medium"))).default_name() == "small"


# --- where a model is found


@pytest.mark.usefixtures("no_network")
def test_the_configured_folder_comes_before_an_installed_package(folder: Path, packages: PackagedModels) -> None:
    assert look(ModelSettings(), packages=packages).find("tiny.en") == Place("package", packages.find("tiny.en"))
    path = make_model(folder, "tiny.en")
    assert look(ModelSettings(directory=folder), packages=packages).obtain("tiny.en") == path


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_found_by_either_name_of_its_model(folder: Path) -> None:
    path = make_model(folder, "large-v3-turbo")
    assert look(ModelSettings(directory=folder)).obtain("turbo") == path


def cache_model(hub_cache: Path, repository: str, *, without: str = "") -> Path:
    root = hub_cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("c" * 40)
    (root / "snapshots").mkdir()
    return make_model(root / "snapshots", "c" * 40, without=without)


@pytest.mark.usefixtures("no_network")
def test_the_hub_cache_is_found_without_any_network(hub_cache: Path) -> None:
    path = cache_model(hub_cache, "Systran/faster-whisper-base")
    catalogue = look(ModelSettings())
    assert catalogue.default_name() == "base"
    assert catalogue.obtain("base") == path


def test_a_download_that_was_interrupted_is_not_taken_for_a_model(hub_cache: Path, packages: PackagedModels) -> None:
    cache_model(hub_cache, "Systran/faster-whisper-small", without="model.bin")
    catalogue = look(ModelSettings(download=False), packages=packages)
    assert "not on this machine" in refusal(catalogue, "small").message


@pytest.mark.usefixtures("no_network")
def test_a_model_that_may_not_be_downloaded_is_not_requested() -> None:
    message = refusal(look(ModelSettings(download=False)), "base").message
    assert "'base'" in message
    assert "models.directory" in message


@pytest.mark.usefixtures("no_network")
def test_the_hubs_own_offline_mode_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(look(ModelSettings()), "base").message


def test_a_model_is_fetched_from_the_hub_once(fake_hub: FakeHub, hub_cache: Path) -> None:
    catalogue = look(ModelSettings())
    path = catalogue.obtain("base")
    assert path.is_relative_to(hub_cache)
    fake_hub.requests.clear()
    assert catalogue.obtain("base") == path
    assert fake_hub.requests == []


def test_a_model_of_the_hub_that_lacks_a_file_is_called_broken(fake_hub: FakeHub) -> None:
    del fake_hub.files["tokenizer.json"]
    assert "tokenizer.json" in refusal(look(ModelSettings()), "base").message


def test_fetching_can_be_stopped(fake_hub: FakeHub) -> None:
    fake_hub.stall_after = 1000
    with pytest.raises(Cancelled):
        look(ModelSettings()).obtain("base", should_stop=fake_hub.stalled.is_set)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "vocabulary.txt"])
@pytest.mark.usefixtures("no_network")
def test_a_folder_that_lacks_a_file_is_called_broken_without_any_network(missing: str, folder: Path) -> None:
    make_model(folder, "base", without=missing)
    message = refusal(look(ModelSettings(directory=folder)), "base").message
    assert "'base'" in message
    assert missing.partition(".")[0] in message
    assert str(folder) not in message


# --- what is said of them


@pytest.mark.parametrize(
    ("name", "multilingual"),
    [("tiny.en", False), ("large-v3", True), ("turbo", True), ("distil-large-v3.5", False), ("unheard-of", None)],
)
def test_of_known_models_the_name_decides_about_languages(name: str, multilingual: bool | None) -> None:  # noqa: FBT001 - expected
    assert look(ModelSettings()).is_multilingual(name) is multilingual


def test_of_other_folders_the_vocabulary_decides(folder: Path) -> None:
    make_model(folder, "english", words=51_864)
    make_model(folder, "many", words=51_866)
    make_model(folder, "odd", without="vocabulary.txt")
    catalogue = look(ModelSettings(directory=folder))
    assert [catalogue.is_multilingual(name) for name in ("english", "many", "odd")] == [False, True, None]


@pytest.mark.usefixtures("no_network")
def test_each_model_is_described_once_and_without_loading_it(
    folder: Path, hub_cache: Path, packages: PackagedModels
) -> None:
    broken = make_model(folder, "our-own", without="config.json")
    cached = cache_model(hub_cache, "Systran/faster-whisper-large-v3")
    settings = ModelSettings(directory=folder, default="large")
    entries = {entry.name: entry for entry in look(settings, packages=packages).entries()}
    assert "large" not in entries, "that is large-v3"
    assert [entries["our-own"].origin, entries["our-own"].path] == ["folder", broken]
    assert entries["our-own"].problem == "config.json is missing"
    assert [entries["large-v3"].origin, entries["large-v3"].path] == ["cache", cached]
    assert [entry.name for entry in entries.values() if entry.default] == ["large-v3"]
    assert [entries["base"].origin, entries["base"].path] == ["package", None]
    assert entries["base"].size_bytes == entries["tiny.en"].size_bytes == 13 * 3 + 5 * 3
    assert [entries["small"].origin, entries["small"].size_bytes] == [None, None]
    assert entries["small"].multilingual
    assert not entries["base"].problem


def test_what_may_be_downloaded_is_what_is_known_and_allowed(folder: Path) -> None:
    make_model(folder, "our-own")
    assert look(ModelSettings(directory=folder)).may_download("small")
    assert not look(ModelSettings(directory=folder)).may_download("our-own")
    assert not look(ModelSettings(allowed=("tiny",))).may_download("small")
    assert not look(ModelSettings(download=False)).may_download("small")


def test_the_folder_for_joined_models_defaults_to_the_users_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        user_data_path = tmp_path / "share"

    monkeypatch.setattr(catalogue_module, "DIRECTORIES", Elsewhere)
    assert Catalogue(ModelSettings())._packages._folder == tmp_path / "share" / "models"
    assert Catalogue(ModelSettings(), folder=tmp_path)._packages._folder == tmp_path


# -- defaults for jobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"), [("de", "de"), ("German", "de"), ("de-AT", "de"), ("auto", None), ("", None)]
)
def test_the_default_language_is_a_code_a_name_or_a_tag(text: str, code: str | None) -> None:
    catalogue = look(ModelSettings(default="base", default_language=text))
    assert (catalogue.default_language, catalogue.language_for("base")) == (code, code)


def test_a_default_language_that_whisper_does_not_know_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match=r"`models.default_language` is 'klingon', which is not a language"):
        look(ModelSettings(default_language="klingon"))


def test_a_default_model_that_does_not_know_the_default_language_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match=r"the default model 'tiny.en' knows English only, and not 'de'"):
        look(ModelSettings(default="tiny.en", default_language="de"))


def test_a_model_that_knows_english_only_gets_no_other_default_language() -> None:
    catalogue = look(ModelSettings(default="base", default_language="de"))
    assert catalogue.language_for("tiny.en") is None
    assert catalogue.language_for("large-v3") == "de"
    assert look(ModelSettings(default="tiny.en", default_language="en")).language_for("tiny.en") == "en"


def test_english_is_assumed_only_where_nobody_said_so() -> None:
    assert look(ModelSettings(default="tiny.en")).assumes_english
    assert not look(ModelSettings(default="tiny.en", default_language="en")).assumes_english
    assert not look(ModelSettings(default="base")).assumes_english


def test_defaults_are_changed_together_or_not_at_all() -> None:
    catalogue = look(ModelSettings(default="base", default_language="de"))
    catalogue.set_defaults("small", "")
    assert (catalogue.default_name(), catalogue.default_language) == ("small", None)
    assert {entry.name for entry in catalogue.entries() if entry.default} == {"small"}
    for model, language in (("tiny.en", "fr"), ("tiny.en", None), ("nonsense", "fr")):
        with pytest.raises(ValueError, match=r"tiny.en|nonsense"):
            catalogue.set_defaults(model, language)
        assert (catalogue.default_name(), catalogue.default_language) == ("small", None)
    catalogue.set_defaults(None, None)
    assert (catalogue.default_name(), catalogue.default_language) == ("base", "de")
