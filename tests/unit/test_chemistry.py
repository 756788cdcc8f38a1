"""The chemistry workload: answers that can be checked by hand, and a split that does not leak."""

from pathlib import Path

import pytest

from workbench.errors import UserError
from workloads.chemistry import (
    TASKS,
    Molecule,
    answers,
    check_split,
    commonest_answers,
    instruction_rows,
    load_molecules,
    split_by_scaffold,
)

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        (ASPIRIN, {"rings": "1", "aromatic rings": "1", "aromatic": "yes", "formula": "C9H8O4", "donors": "1",
                   "heteroatoms": "4", "halogen": "no", "groups": "acid, ester"}),
        ("CCO", {"rings": "0", "aromatic": "no", "formula": "C2H6O", "donors": "1", "acceptors": "1",
                 "rotatable bonds": "0", "groups": "alcohol"}),
        ("Clc1ccc(Br)cc1", {"halogen": "yes", "groups": "halide", "heteroatoms": "2"}),
        ("C1CCCCC1", {"rings": "1", "aromatic rings": "0", "aromatic": "no", "groups": "none"}),
        ("CC(N)=O", {"groups": "amide"}),
        ("CC#N", {"groups": "nitrile", "acceptors": "1"}),
        ("c1ccsc1", {"sulfur": "yes", "groups": "none"}),
        ("CSC", {"sulfur": "yes", "groups": "sulfide"}),
        ("O=[N+]([O-])c1ccccc1", {"groups": "nitro"}),
        ("Nc1ccccc1O", {"groups": "amine, phenol", "donors": "2"}),
        ("CC(C)=O", {"groups": "ketone"}),
        ("COC", {"groups": "ether"}),
    ],
)  # fmt: skip
def test_answers_are_those_of_a_chemist(smiles: str, expected: dict[str, str]) -> None:
    given = answers(smiles)
    assert {task: given[task] for task in expected} == expected


def test_molecules_are_read_once_each_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "molecules.smi"
    file.write_text(f"OCC\t1\nCCO\t2\nnot a molecule\t3\n[Na+].CC(=O)[O-]\t4\n{'C' * 50}\t5\n{ASPIRIN}\t6\n")
    molecules, dropped = load_molecules(file)
    assert [molecule.smiles for molecule in molecules] == ["CCO", ASPIRIN]
    assert dropped == {"unreadable": 1, "several parts": 1, "too large": 1, "duplicate": 1}
    assert [molecule.scaffold for molecule in molecules] == ["", "c1ccccc1"]


def test_rdkit_without_its_data_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rdkit import RDConfig

    monkeypatch.setattr(RDConfig, "RDDataDir", str(tmp_path))
    with pytest.raises(UserError, match=r"data=FILE\.jsonl"):
        load_molecules()


@pytest.fixture(scope="module")
def molecules() -> list[Molecule]:
    return load_molecules()[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_molecule_and_no_scaffold_is_in_two_parts(molecules: list[Molecule], seed: int) -> None:
    split = split_by_scaffold(molecules, seed=seed)
    assert check_split(split) == {"molecules_shared": 0, "scaffolds_shared": 0}
    assert sum(map(len, split.values())) == len(molecules)
    assert len(split["test"]) > 0.1 * len(molecules)
    assert all(molecule.scaffold for molecule in split["test"])  # acyclic molecules are for training


def test_the_same_seed_gives_the_same_split_and_another_seed_another(molecules: list[Molecule]) -> None:
    again = split_by_scaffold(list(reversed(molecules)), seed=0)
    first = split_by_scaffold(molecules, seed=0)
    assert {m.smiles for m in again["test"]} == {m.smiles for m in first["test"]}
    assert {m.smiles for m in split_by_scaffold(molecules, seed=1)["test"]} != {m.smiles for m in first["test"]}


def test_the_check_finds_a_molecule_and_a_scaffold_in_two_parts() -> None:
    toluene, cresol, ethanol = Molecule("Cc1ccccc1", "wrong"), Molecule("Cc1ccccc1O", "also wrong"), Molecule("CCO", "")
    assert check_split({"train": [toluene], "test": [cresol]}) == {"molecules_shared": 0, "scaffolds_shared": 1}
    assert check_split({"train": [ethanol], "test": [Molecule("OCC", "")]})["molecules_shared"] == 1


def test_every_molecule_is_asked_every_task_in_varied_words(molecules: list[Molecule]) -> None:
    rows = instruction_rows(molecules[:40], seed=0)
    assert len(rows) == 40 * len(TASKS)
    assert rows == instruction_rows(molecules[:40], seed=0)
    for task in TASKS:
        assert {row["instruction"] for row in rows if row["task"] == task.name} == set(task.phrasings)


def test_the_commonest_answer_is_counted_by_task() -> None:
    rows = [{"task": "a", "output": output} for output in "1221"] + [{"task": "b", "output": "no"}]
    assert commonest_answers(rows) == {"a": "1", "b": "no"}  # a tie goes to the first in alphabetical order
