"""The files that an installation is checked against: every package pinned, and known by its hashes."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "requirements").glob("*.txt"))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {normalized(name): version for name, version in pairs}


def hashed(path: Path) -> dict[str, tuple[str, list[str]]]:
    """The version and the hashes of each package of a file."""
    found = {}
    for line in path.read_text().replace("\\\n", " ").splitlines():
        requirement, *hashes = line.split("--hash=")
        name, version = requirement.partition(";")[0].split("==")
        found[normalized(name)] = version.strip(), [each.strip() for each in hashes]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_package_has_the_pinned_version_and_hashes_and_no_address(path: Path) -> None:
    found = hashed(path)
    assert found
    assert {name: version for name, (version, _) in found.items()}.items() <= pinned().items()
    for name, (_, hashes) in found.items():
        assert hashes, name
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), name
    assert "://" not in path.read_text()


def test_every_pinned_package_has_hashes() -> None:
    known = {name for path in FILES for name in hashed(path)}
    assert pinned().keys() - known == set()
    assert hashed(ROOT / "requirements" / "run.txt").items() <= hashed(ROOT / "requirements" / "all.txt").items()


def test_all_that_pyproject_names_has_hashes() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = document["project"]["optional-dependencies"].values()
    named = [*document["project"]["dependencies"], *(each for extra in extras for each in extra)]
    names = {normalized(re.split(r"[\[<>=;~ ]", each)[0]) for each in named} - {"cesar-mqtt"}
    assert names - hashed(ROOT / "requirements" / "all.txt").keys() == set()
    (builder,) = document["build-system"]["requires"]
    assert normalized(re.split("[>=]", builder)[0]) in hashed(ROOT / "requirements" / "build.txt")
