"""Text to pretrain on: records of molecules, then documents, each a sequence of its own.

A record states what RDKit computes about a molecule, in an order drawn anew each time:

    CC(=O)Oc1ccccc1C(=O)O
    donors: 1; rings: 1; formula: C9H8O4; groups: acid, ester; ...

Some records spell the molecule in a random way, which is augmentation for a grammar in which one molecule has many
spellings (Bjerrum 2017, arXiv:1703.07076); most have the canonical SMILES, which is what questions have.
"""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workloads.chemistry import Molecule, answers


def molecule_records(molecules: Sequence[Molecule], *, copies: int, randomised: float = 0.0, seed: int) -> list[str]:
    """``copies`` records of every molecule, shuffled; a share ``randomised`` of them with a randomised SMILES."""
    from rdkit import Chem

    draw = random.Random(f"records {seed}")
    records = []
    for molecule in molecules:
        mol = Chem.MolFromSmiles(molecule.smiles)
        facts = [f"{name}: {answer}" for name, answer in answers(molecule.smiles).items()]
        for _ in range(copies):
            draw.shuffle(facts)
            smiles = molecule.smiles
            if draw.random() < randomised:
                smiles = Chem.MolToRandomSmilesVect(mol, 1, randomSeed=draw.randrange(1, 2**31))[0]
            records.append(f"{smiles}\n{'; '.join(facts)}")
    draw.shuffle(records)
    return records


def read_documents(folder: Path, *, limit: int, characters: int) -> list[str]:
    """The first ``characters`` of up to ``limit`` documents with ``keep`` true, from Parquet files in name order.

    Raises UserError where there is no Parquet file or no column ``text``.
    """
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]
    if not files:
        raise UserError(f"documents: no Parquet file in {folder}; give the documents folder of a 'data audit' run")
    texts: list[str] = []
    for file in files:
        columns = pq.read_schema(file).names
        if "text" not in columns:
            raise UserError(f"documents: {file} has no column 'text', only {', '.join(columns)}")
        table = pq.read_table(file, columns=[c for c in ("text", "keep") if c in columns]).to_pydict()
        kept = table.get("keep", [True] * len(table["text"]))
        texts += [text[:characters] for text, keep in zip(table["text"], kept, strict=True) if keep and text]
        if len(texts) >= limit:
            break
    return texts[:limit]


def sequences(texts: Iterable[str], tokenizer: Any, limit: int) -> list[list[int]]:
    """Token ids of each text and its end token, in pieces of at most ``limit``.

    Texts do not share a sequence: without a mask between them a small model spends its attention on telling one
    molecule from the one before it.
    """
    pieces: list[list[int]] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False).input_ids:
        ids = [*encoded, tokenizer.eos_token_id]
        pieces += [ids[start : start + limit] for start in range(0, len(ids), limit)]
    return [piece for piece in pieces if len(piece) > 1]
