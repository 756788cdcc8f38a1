"""What the audit keeps of every document in memory: 300 bytes of hashes and buckets, never the text."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from data_pipelines.duplicates import BANDS


@dataclass
class Index:
    """Gather with ``add``, then ``close``: from then on each name is an array with one entry a document, ordered by
    id, so that nothing depends on the order in which documents arrive.

    ``alive`` says which rows count: of rows with one given id only one does. ``places`` maps a row's place on arrival
    to its place now. Equal documents without a given id get ``copy_name``s; ``base`` is the place of the first of them.
    """

    splits: list[str] = field(default_factory=list)
    rows: int = 0
    _parts: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, batch: pa.Table) -> None:
        """Take the rows of ``measure.measure`` that have no reason."""
        split = batch["split"][0].as_py()
        if split not in self.splits:
            self.splits.append(split)
        self._take("ids", np.array([name.encode() for name in batch["id"].to_pylist()]))
        self._take("hashes", np.array(batch["normal_hash"].to_pylist(), dtype="V16"))
        bands = np.frombuffer(b"".join(batch["bands"].to_pylist()), dtype=np.uint64)
        self._take("bands", bands.reshape(-1, BANDS))
        self._take("characters", batch["characters"].to_numpy())
        self._take("content", batch["content"].to_numpy())
        self._take("unnamed", batch["unnamed"].to_numpy(zero_copy_only=False))
        self._take("split", np.full(batch.num_rows, self.splits.index(split), dtype=np.uint16))
        exchange = "prompt_hash" in batch.column_names
        for name in ("prompt_hash", "answer_hash"):
            given = np.array(batch[name].to_pylist(), dtype="V16") if exchange else np.zeros(batch.num_rows, "V16")
            self._take(name, given)
        self.rows += batch.num_rows

    def _take(self, name: str, values: np.ndarray) -> None:
        self._parts.setdefault(name, []).append(values)

    def close(self) -> None:
        """Join what was gathered, and choose among rows with one id."""
        if not self.rows:
            return
        order = np.lexsort((np.concatenate(self._parts["content"]), np.concatenate(self._parts["ids"])))
        self.places = np.empty_like(order)
        self.places[order] = np.arange(len(order))
        # One after the other, so that hardly more than the arrays themselves is in memory.
        joined = {name: np.concatenate(self._parts.pop(name))[order] for name in list(self._parts)}
        self.ids, self.hashes, self.bands = joined["ids"], joined["hashes"], joined["bands"]
        self.characters, self.content, self.split = joined["characters"], joined["content"], joined["split"]
        self.prompts, self.answers = joined["prompt_hash"], joined["answer_hash"]
        copies = copies_of(self.ids) * joined["unnamed"]
        self.base = np.arange(self.rows) - copies
        if copies.any():
            self.ids = self.ids.astype(f"S{self.ids.dtype.itemsize + 8}")
            for place in np.flatnonzero(copies).tolist():
                self.ids[place] = copy_name(self.name(place), copies[place]).encode()
        self.alive = np.concatenate([[True], self.ids[1:] != self.ids[:-1]])

    def name(self, index: int) -> str:
        """The id of a document."""
        return bytes(self.ids[index]).decode()

    def of(self, splits: list[str]) -> np.ndarray:
        """The indices of the documents of ``splits`` that count."""
        wanted = [place for place, name in enumerate(self.splits) if name in splits]
        return np.flatnonzero(np.isin(self.split, wanted) & self.alive)


def copies_of(ids: np.ndarray) -> np.ndarray:
    """How many entries of the same id stand before each entry of ``ids``, which are sorted."""
    first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    return np.arange(len(ids)) - np.repeat(first, np.diff([*first, len(ids)]))


def copy_name(name: str, copies: int) -> str:
    """The id of a document with ``copies`` equal ones before it; names stay in order."""
    return f"{name}-{copies + 1:07d}"


def conflicting(index: Index) -> dict[str, int]:
    """How many other answers there are to the same question, by id, for exchanges that have any; the same answer given
    twice is a duplicate and no conflict."""
    asked: dict[bytes, dict[bytes, list[int]]] = {}
    exchanges = np.ascontiguousarray(index.prompts).view(np.uint64).reshape(-1, 2).any(axis=1)
    for place in np.flatnonzero(index.alive & exchanges).tolist():
        prompt = index.prompts[place].tobytes()
        asked.setdefault(prompt, {}).setdefault(index.answers[place].tobytes(), []).append(place)
    return {
        index.name(place): len(answers) - 1
        for answers in asked.values()
        if len(answers) > 1
        for places in answers.values()
        for place in places
    }
