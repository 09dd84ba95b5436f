"""Prints the lowest declared version of every requirement, one per line, for `make test-floors`. Torch is left out, as
the tests can install one build of it only."""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("deepspeed", "test")


def lowest_versions(pyproject: Path) -> dict[str, str]:
    """Name -> lowest version, of the requirements and of the extras that the tests use.

    Raises:
        ValueError: If a requirement has not exactly one floor.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    lowest = {}
    for requirement in map(Requirement, lines):
        floors = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if len(floors) != 1 or lowest.get(requirement.name, floors[0]) != floors[0]:
            raise ValueError(f"`{requirement}` must have one lowest version, the same in all lists.")
        lowest[requirement.name] = floors[0]
    del lowest["torch"]
    return lowest


if __name__ == "__main__":
    versions = lowest_versions(Path(__file__).parents[2] / "pyproject.toml")
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in versions.items()))
