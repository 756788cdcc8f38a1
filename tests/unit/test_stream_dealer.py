"""Rows that come a part at a time are dealt as rows that lie ready, from whichever step, whatever was killed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from workbench.errors import UserError
from workloads.chat_templates import load_tokenizer
from workloads.encoding import Counts, Recipe
from workloads.stream_dealer import Mark, Part, StreamDealer
from workloads.streaming import tokenize_lines
from workloads.tokenized import TokenRows, tokenize
from workloads.tokenizer import train_tokenizer
from workloads.training import dealing
from workloads.training.batches import Batches
from workloads.training.dealing import Deal

ROWS = 400


def talk(number: int) -> dict[str, Any]:
    """A sum, of a length of its own; every tenth is not answered."""
    asked = f"What is {number} and {number}? " + "Think well. " * (number % 13)
    said = "" if number % 10 == 3 else f"It is {2 * number}."
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"id": f"talk-{number}", "messages": turns}


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return [json.dumps(talk(number)).encode() + b"\n" for number in range(ROWS)]


@pytest.fixture(scope="module")
def recipe(lines: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([line.decode() for line in lines], 400, 512)
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    return Recipe(str(folder), max_length=60)


class Here:
    """Tokenizes in this process, seven rows at a time, and counts them."""

    def __init__(self, lines: list[bytes], recipe: Recipe) -> None:
        self.lines, self.recipe, self.rows = lines, recipe, 0
        self._tokenizer = load_tokenizer(recipe.base)

    def __call__(self, numbers: Sequence[int]) -> Iterator[Part]:
        for start in range(0, len(numbers), 7):
            some = [self.lines[number] for number in numbers[start : start + 7]]
            self.rows += len(some)
            made = tokenize_lines(some, self.recipe, self._tokenizer)
            counts = [Counts(*map(int, each)) for each in made["counts"].reshape(len(some), -1)]
            yield pa.ipc.open_stream(made["rows"]).read_next_batch(), counts


@pytest.mark.parametrize("capacity", [0, 128], ids=["plain", "packed"])
def test_batches_are_those_of_rows_that_lie_ready_from_whichever_step(
    lines: list[bytes], recipe: Recipe, tmp_path: Path, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dealing, "PACKED_WINDOW", 50)
    (tmp_path / "talks.jsonl").write_bytes(b"".join(lines))
    ready = TokenRows(tokenize(tmp_path / "talks.jsonl", recipe, tmp_path / "cache"))
    deal, ledger = Deal(5, 3, capacity), tmp_path / "stream.jsonl"
    expected = Batches(ready, deal.batch_size, deal.seed, deal.capacity)
    epoch = len(expected.first_epoch())
    steps = int(1.5 * epoch)

    first = StreamDealer(ROWS, deal, Here(lines, recipe), ledger)
    made = [first.batch(step) for step in range(steps)]
    assert made == [expected[step] for step in range(steps)]
    assert first.told().counts == ready.counts  # the first epoch is over
    assert ready.counts.rows_dropped == ROWS // 10
    assert first.sources(1) == expected.sources(1)
    if capacity:
        assert first.told().tokens / (first.told().sequences * capacity) == pytest.approx(expected.efficiency, abs=0.05)
    assert first.batch(2) == made[2]  # asked for again, long after
    assert first.batch(epoch) == made[epoch]

    begun, source = epoch * 2 // 3, Here(lines, recipe)
    again = StreamDealer(ROWS, deal, source, ledger)  # another process, with what was written
    assert again.batch(begun) == made[begun]
    assert source.rows < ROWS // 2  # not the rows before
    assert [again.batch(step) for step in range(begun, steps)] == made[begun:]
    assert again.told().counts == ready.counts

    ledger.write_text(ledger.read_text()[:-30])  # killed while it wrote
    killed = StreamDealer(ROWS, deal, source, ledger)
    assert [killed.batch(step) for step in range(begun, steps)] == made[begun:]
    assert StreamDealer(ROWS, deal, source, ledger).batch(begun) == made[begun]  # after what ``killed`` has added
    ledger.unlink()  # a run that was not streamed so far
    assert StreamDealer(ROWS, deal, source, ledger).batch(begun) == made[begun]


def test_little_is_held(lines: list[bytes], recipe: Recipe, tmp_path: Path) -> None:
    source = Here(lines, recipe)
    dealer = StreamDealer(ROWS, Deal(5, 3), source, tmp_path / "stream.jsonl")
    dealer.batch(0)
    assert source.rows <= 5 * dealing.WINDOW * 1.2 + 7  # the first window
    for step in range(40):
        dealer.batch(step)
    assert len(dealer._made) <= 5


def test_rows_that_fill_no_batch_are_refused(lines: list[bytes], recipe: Recipe, tmp_path: Path) -> None:
    silent = [json.dumps({"id": "s", "messages": [{"role": "user", "content": "Hm?"}]}).encode()] * 20
    dealer = StreamDealer(20, Deal(5, 3), Here(silent, recipe), tmp_path / "stream.jsonl")
    for _ in ("asked", "asked again, as another rank does"):
        with pytest.raises(UserError, match="0 of 20 training rows have an answer to learn, which fill no batch"):
            dealer.batch(0)


def test_a_mark_comes_back_from_its_row() -> None:
    mark = Mark(7, 1, 2, 33, ((1, 2), (3,)), Counts(rows=4), 50, 6)
    assert Mark.of_row(json.loads(json.dumps(asdict(mark)))) == mark
