"""Molecules with answers that RDKit computes: the instruction set and the scaffold split of the chemistry workload.

    molecules, dropped = load_molecules()
    split = split_by_scaffold(molecules, seed=0)
    rows = instruction_rows(split["test"], seed=0)   # {instruction, input, output, task, smiles}

The molecules are the first 5,000 of the NCI open database, which RDKit's package carries. Train and test share no
Bemis-Murcko scaffold (Bemis and Murcko 1996, J. Med. Chem. 39, 2887): a held-out ring system is a new ring system,
not a training molecule with a methyl more.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workloads.functional_groups import functional_groups, pattern

MAX_HEAVY_ATOMS = 40
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Molecule:
    """A molecule by its canonical SMILES; ``scaffold`` is its Murcko scaffold's SMILES, "" without a ring."""

    smiles: str
    scaffold: str


@dataclass(frozen=True)
class Task:
    """A question about a molecule: ``name`` as in a record, several phrasings, and how its answer is computed."""

    name: str
    phrasings: tuple[str, ...]
    answer: Callable[[Any], str]  # takes an rdkit Mol


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _descriptor(name: str) -> Callable[[Any], str]:
    def answer(mol: Any) -> str:
        from rdkit.Chem import rdMolDescriptors

        return str(getattr(rdMolDescriptors, name)(mol))

    return answer


def _formula(mol: Any) -> str:
    from rdkit.Chem import rdMolDescriptors

    return str(rdMolDescriptors.CalcMolFormula(mol))


def _contains(smarts: str) -> Callable[[Any], str]:
    return lambda mol: _yes_no(mol.HasSubstructMatch(pattern(smarts)))


def _groups(mol: Any) -> str:
    return ", ".join(functional_groups(mol)) or "none"


TASKS = (
    Task(
        "rings",
        ("How many rings does this molecule have?", "Count the rings.", "Give the number of rings in the structure."),
        _descriptor("CalcNumRings"),
    ),
    Task(
        "aromatic rings",
        (
            "How many aromatic rings does this molecule have?",
            "Count the aromatic rings.",
            "Give the number of aromatic rings in the structure.",
        ),
        _descriptor("CalcNumAromaticRings"),
    ),
    Task(
        "aromatic",
        ("Is this molecule aromatic?", "Does the structure have an aromatic ring?", "Answer yes or no: aromatic?"),
        _contains("a"),
    ),
    Task(
        "halogen",
        ("Does this molecule contain a halogen?", "Is there any halogen atom?", "Answer yes or no: a halogen?"),
        _contains("[F,Cl,Br,I]"),
    ),
    Task(
        "sulfur",
        ("Does this molecule contain sulfur?", "Is there any sulfur atom?", "Answer yes or no: sulfur?"),
        _contains("[#16]"),
    ),
    Task(
        "donors",
        (
            "How many hydrogen-bond donors does this molecule have?",
            "Count the hydrogen-bond donors.",
            "Give the number of hydrogen-bond donors.",
        ),
        _descriptor("CalcNumHBD"),
    ),
    Task(
        "acceptors",
        (
            "How many hydrogen-bond acceptors does this molecule have?",
            "Count the hydrogen-bond acceptors.",
            "Give the number of hydrogen-bond acceptors.",
        ),
        _descriptor("CalcNumHBA"),
    ),
    Task(
        "heteroatoms",
        ("How many heteroatoms does this molecule have?", "Count the heteroatoms.", "Give the number of heteroatoms."),
        _descriptor("CalcNumHeteroatoms"),
    ),
    Task(
        "rotatable bonds",
        (
            "How many rotatable bonds does this molecule have?",
            "Count the rotatable bonds.",
            "Give the number of rotatable bonds.",
        ),
        _descriptor("CalcNumRotatableBonds"),
    ),
    Task(
        "groups",
        (
            "Which functional groups does this molecule have?",
            "List the functional groups.",
            "Name the functional groups of the structure.",
        ),
        _groups,
    ),
    Task(
        "formula",
        ("What is the molecular formula?", "Give the molecular formula.", "Write the formula of this molecule."),
        _formula,
    ),
)


def nci_file() -> Path:
    """RDKit's own file of 5,000 NCI molecules. Raises UserError where this RDKit carries none."""
    from rdkit import RDConfig

    file = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
    if not file.is_file():
        raise UserError(
            f"no NCI molecules at {file}: this RDKit carries no data; install rdkit from its wheel, "
            "or give your own JSONL of instruction, input and output as data=FILE.jsonl"
        )
    return file


def load_molecules(file: Path | None = None) -> tuple[list[Molecule], dict[str, int]]:
    """Parse, canonicalise and deduplicate the molecules of a SMILES file, in file order.

    Also counts what was left out: ``unreadable``, ``several parts`` (salts: their scaffold is that of one part only),
    ``too large`` (over ``MAX_HEAVY_ATOMS``), ``duplicate``.
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds import MurckoScaffold

    dropped = {"unreadable": 0, "several parts": 0, "too large": 0, "duplicate": 0}
    found: dict[str, Molecule] = {}
    with rdBase.BlockLogs():
        for line in (file or nci_file()).read_text().splitlines():
            mol = Chem.MolFromSmiles(line.split("\t")[0])
            if mol is None or mol.GetNumAtoms() == 0:
                dropped["unreadable"] += 1
                continue
            smiles = Chem.MolToSmiles(mol)
            if "." in smiles:
                dropped["several parts"] += 1
            elif mol.GetNumHeavyAtoms() > MAX_HEAVY_ATOMS:
                dropped["too large"] += 1
            elif smiles in found:
                dropped["duplicate"] += 1
            else:
                found[smiles] = Molecule(smiles, MurckoScaffold.MurckoScaffoldSmiles(mol=mol))
    return list(found.values()), dropped


def split_by_scaffold(
    molecules: Sequence[Molecule], *, seed: int, validation: float = 0.05, test: float = 0.15
) -> dict[str, list[Molecule]]:
    """Split so that no scaffold is in two parts; the same for the same molecules and seed.

    Scaffolds are dealt in an order drawn from ``seed``. A scaffold with over 2% of the molecules (benzene, no ring at
    all) goes to train: held out, it would make up most of the test set. Fractions are of the molecules.
    """
    families: dict[str, list[Molecule]] = {}
    for molecule in molecules:
        families.setdefault(molecule.scaffold, []).append(molecule)
    order = sorted(families)
    random.Random(seed).shuffle(order)
    room = {"test": int(test * len(molecules)), "validation": int(validation * len(molecules))}
    split: dict[str, list[Molecule]] = {name: [] for name in SPLITS}
    for scaffold in order:
        family = families[scaffold]
        small = scaffold != "" and len(family) <= 0.02 * len(molecules)
        part = next((p for p in room if small and len(split[p]) + len(family) <= room[p]), "train")
        split[part] += family
    return split


def check_split(split: dict[str, list[Molecule]]) -> dict[str, int]:
    """Recompute molecules and scaffolds from the SMILES and count those in more than one part: both must be 0."""
    from rdkit import Chem
    from rdkit.Chem.Scaffolds import MurckoScaffold

    parts_of_molecule: dict[str, set[str]] = {}
    parts_of_scaffold: dict[str, set[str]] = {}
    for part, molecules in split.items():
        for molecule in molecules:
            mol = Chem.MolFromSmiles(molecule.smiles)
            parts_of_molecule.setdefault(Chem.MolToSmiles(mol), set()).add(part)
            parts_of_scaffold.setdefault(MurckoScaffold.MurckoScaffoldSmiles(mol=mol), set()).add(part)
    return {
        "molecules_shared": sum(len(parts) > 1 for parts in parts_of_molecule.values()),
        "scaffolds_shared": sum(len(parts) > 1 for parts in parts_of_scaffold.values()),
    }


def answers(smiles: str) -> dict[str, str]:
    """RDKit's answer to every task for one molecule, by task name."""
    from rdkit import Chem

    mol = Chem.MolFromSmiles(smiles)
    return {task.name: task.answer(mol) for task in TASKS}


def instruction_rows(molecules: Sequence[Molecule], *, seed: int) -> list[dict[str, str]]:
    """One row per molecule and task, phrased by a draw from ``seed``: instruction, input, output, task, smiles.

    The output names the property before its value, ``rings: 2``: said in the words that pretraining used, it takes
    fine-tuning a fraction of the steps.
    """
    draw = random.Random(f"phrasing {seed}")
    rows = []
    for molecule in molecules:
        truth = answers(molecule.smiles)
        for task in TASKS:
            rows.append(
                {
                    "instruction": draw.choice(task.phrasings),
                    "input": molecule.smiles,
                    "output": f"{task.name}: {truth[task.name]}",
                    "task": task.name,
                    "smiles": molecule.smiles,
                }
            )
    return rows


def commonest_answers(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Each task's most frequent answer in ``rows``: what a model that never looks at the molecule would say."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["task"], Counter())[row["output"]] += 1
    return {task: min(counter, key=lambda a: (-counter[a], a)) for task, counter in counts.items()}
