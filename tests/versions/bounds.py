"""Print the requirements, one per line: pinned to their lowest versions (`lowest`) or without upper bounds (`newest`),
for these two parts of `make test-all`. Torch is left out: the tests can install only one build of it."""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("deepspeed", "test")
OPERATORS = {"lowest": "==", "newest": ">="}


def floors(pyproject: Path) -> dict[str, str]:
    """Name -> lowest version, of the requirements and of the extras that the tests use.

    Raises:
        ValueError: If a requirement has not exactly one floor.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    lowest = {}
    for requirement in map(Requirement, lines):
        versions = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if len(versions) != 1 or lowest.get(requirement.name, versions[0]) != versions[0]:
            raise ValueError(f"`{requirement}` must have one lowest version, the same in all lists.")
        lowest[requirement.name] = versions[0]
    del lowest["torch"]
    return lowest


if __name__ == "__main__":
    operator = OPERATORS[sys.argv[1]]
    versions = floors(Path(__file__).parents[2] / "pyproject.toml")
    sys.stdout.write("".join(f"{name}{operator}{version}\n" for name, version in versions.items()))
