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

from workbench.data_version import version_of
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


def document_files(folder: Path) -> list[Path]:
    """The Parquet files of ``folder`` in name order, or the file itself.

    Raises UserError where there is none, or one lacks a column ``text`` of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder]
    if not files:
        raise UserError(f"documents: no Parquet file in {folder}; give the documents folder of a 'data audit' run")
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"documents: {file} is not Parquet: {error}") from None
        if "text" not in schema.names:
            raise UserError(f"documents: {file} has no column 'text', only {', '.join(schema.names)}")
        kind = schema.field("text").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(
            is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        ):
            raise UserError(f"documents: the column 'text' of {file} holds {kind}, not text")
    return files


def documents_version(folder: Path) -> str | None:
    """The data version of documents with ids, as ``data audit`` and ``data filter`` tell it; None without ids."""
    import pyarrow.dataset as ds

    documents = ds.dataset([str(file) for file in document_files(folder)], format="parquet")
    return version_of(documents) if "id" in documents.schema.names else None


def read_documents(folder: Path, *, limit: int, characters: int) -> list[str]:
    """The first ``characters`` of up to ``limit`` documents with ``keep`` true, from Parquet files in name order.

    Raises UserError as ``document_files`` does.
    """
    import pyarrow.parquet as pq

    texts: list[str] = []
    for file in document_files(folder):
        columns = [name for name in ("text", "keep") if name in pq.read_schema(file).names]
        table = pq.read_table(file, columns=columns).to_pydict()
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
