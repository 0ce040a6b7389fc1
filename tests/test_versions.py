"""What pyproject.toml declares is what `make test-oldest` runs with."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pinned(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {name.lower(): Version(version) for name, version in (line.split("==") for line in lines)}


def declared() -> dict[str, Version]:
    """The lowest version of everything that the package and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    requirements = [Requirement(line) for line in lines]
    return {
        requirement.name.lower(): Version(specifier.version)
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }


def test_the_oldest_run_has_the_declared_versions():
    oldest = pinned("constraints-oldest.txt")
    assert {name: oldest.get(name) for name in declared()} == declared()


def test_the_usual_run_has_versions_that_are_declared():
    usual = pinned("constraints.txt")
    assert not {name: version for name, version in declared().items() if usual[name] < version}
