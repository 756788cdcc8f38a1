"""From files to token rows: dealt, tokenized once, counted, and refused where nothing could be learned."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workloads.tokenized
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import Run, open_run
from workloads.chat_templates import load_tokenizer
from workloads.conversations import read_conversations, write_conversations
from workloads.encoding import Recipe, encode
from workloads.instructions import as_conversation, load_instructions
from workloads.prepared import PARTS, Prepared, batches_of, deal, look, prepare, recipe_of
from workloads.sft import SftConfig
from workloads.tokenized import TokenRows, cache_folder, tokenize
from workloads.tokenizer import train_tokenizer
from workloads.training.batches import Batches

ROWS = [
    {"instruction": f"Add {i} and {i}.", "input": "1 2 3 4 " * (i % 7), "output": f"It is {2 * i}."} for i in range(100)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a model's config: weights are not read before training."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([json.dumps(row) for row in ROWS], 400, 512)
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config(base: Path, data: Path | str, *overrides: str) -> SftConfig:
    small = ["steps=20", "batch_size=4", "warmup_steps=1", "max_length=64"]
    return load(SftConfig, None, [f"base={base}", f"data={data}", *small, *overrides])


@pytest.fixture
def run(runs_root: Path, base: Path, data: Path) -> Iterator[Run]:
    with open_run("train", "sft", config(base, data)) as opened:
        yield opened


@given(st.integers(3, 400), st.integers(0, 3), st.integers(1, 50), st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_no_row_is_in_two_parts(count: int, seed: int, limit: int, held_out: int) -> None:
    sizes = [deal(count, seed, 0, limit, held_out).count(place) for place in range(len(PARTS) + 1)]
    cut = max(1, count // 20)
    assert sum(sizes) == count
    assert sizes[:3] == [min(limit, count - 2 * cut), min(held_out, cut), cut]


def test_the_rows_held_out_are_those_that_an_evaluation_asks(run: Run, base: Path, data: Path) -> None:
    prepare(config(base, data), run)
    asked = load_instructions([data], split_seed=0, seed=0, limit=10**9, held_out=1)
    kept = {row.messages[0].content for row in read_conversations(run.artifact("test.jsonl"))}
    assert len(asked.test) == 5
    assert {row["instruction"] for row in asked.test} == kept


def test_token_rows_are_those_of_the_conversations_in_their_order(run: Run, base: Path, data: Path) -> None:
    given = config(base, data, "max_length=48")
    made = prepare(given, run)
    conversations = list(read_conversations(run.artifact("train.jsonl")))
    expected, counts = encode(conversations, load_tokenizer(str(base)), recipe_of(given))
    rows = TokenRows(made.train)
    assert list(rows) == expected == rows[:]
    assert rows.lengths == [len(row.ids) for row in expected]
    assert (rows[-1], rows[3:5]) == (expected[-1], expected[3:5])
    assert made.counts == counts
    assert made.summary["truncated"] == counts.rows_cut > 0
    assert rows[0].sources[0].startswith("rows.jsonl:")


def test_rows_are_tokenized_once(run: Run, base: Path, data: Path) -> None:
    first = prepare(config(base, data), run)
    shards = [file.stat().st_mtime_ns for file in first.train.glob("*.arrow")]
    again = prepare(config(base, data, "learning_rate=0.1"), run)
    assert again.train == first.train
    assert [file.stat().st_mtime_ns for file in again.train.glob("*.arrow")] == shards
    for change in ("max_length=32", "train_on=all", "chat_template=plain"):
        assert prepare(config(base, data, change), run).train != first.train
    assert not list(cache_folder().glob(".*"))


def test_ranges_of_a_file_are_its_rows(run: Run, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config(base, data), run)
    monkeypatch.setattr(workloads.tokenized, "SHARD_BYTES", 500)
    file = run.artifact("train.jsonl")
    ranges = list(workloads.tokenized._ranges(file))
    assert len(ranges) > 5
    parts = [row for start, end in ranges for row in read_conversations(file, start, end)]
    assert parts == list(read_conversations(file))


def test_packed_rows_are_counted(run: Run, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = config(base, data, "packing=true", "max_length=128", "steps=2", "batch_size=2")
    made = prepare(given, run)
    assert made.counts.rows == 90  # all of them: how many fit is not known beforehand
    assert made.packed is not None and made.packed > 0.9
    assert made.summary["packing_efficiency"] == made.packed
    assert "of them tokens" in capsys.readouterr().err
    dealt = [
        source
        for batch in batches_of(TokenRows(made.train), given).first_epoch()
        for row in batch
        for source in row.sources
    ]
    every = {row.sources[0] for row in TokenRows(made.train)}
    assert len(dealt) == len(set(dealt)) and set(dealt) <= every
    assert len(every) - len(dealt) < 20  # one sequence of two may fill no batch


def test_what_was_cut_and_left_out_is_said(
    run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, *[{"instruction": "Say nothing.", "output": ""}] * 100]
    made = prepare(config(base, write(tmp_path / "more.jsonl", rows), "steps=100", "max_length=32"), run)
    said = capsys.readouterr().err
    assert f"max_length=32 cut {made.counts.rows_cut} rows by {made.counts.tokens_lost:,} tokens" in said
    assert f"{made.counts.rows_dropped} rows without an answer were left out" in said
    assert made.counts.rows + made.counts.rows_dropped == 180
    assert made.summary["rows_dropped"] > 70


def refused(run: Run, given: SftConfig) -> str:
    with pytest.raises(UserError) as error:
        prepare(given, run)
    return str(error.value)


def test_data_that_teach_nothing_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [{"instruction": "Say nothing.", "output": " "}] * 9)
    assert "none of 7 training rows has an answer to learn" in refused(run, config(base, empty))
    long = write(tmp_path / "long.jsonl", [{"instruction": "Count.", "output": "one, two, three, four, " * 9}] * 99)
    message = refused(run, config(base, long, "max_length=8"))
    assert "max_length=8 is shorter than every answer" in message
    enough = int(message.rpartition("max_length=")[2].split()[0])
    assert prepare(config(base, long, f"max_length={enough}"), run).counts.answers_cut == 0
    assert "too few to hold any out" in refused(run, config(base, write(tmp_path / "two.jsonl", ROWS[:2])))
    assert "batch_size=3 or less" in refused(run, config(base, write(tmp_path / "five.jsonl", ROWS[:5])))


def test_rows_that_are_left_out_do_not_sit_the_others_out(base: Path, tmp_path: Path) -> None:
    rows = ROWS[:20] + [{"instruction": "Say nothing.", "output": ""}] * 10
    talks = [as_conversation(row, f"row {place}") for place, row in enumerate(rows)]
    write_conversations(talks, tmp_path / "rows.jsonl")
    made = TokenRows(tokenize(tmp_path / "rows.jsonl", Recipe(str(base), max_length=64), tmp_path / "cache"))
    assert (made.read, len(made)) == (30, 20)
    assert all(len(Batches(made, 16, seed).first_epoch()) == 1 for seed in range(10))


def test_a_hint_counts_what_the_template_writes_behind_an_answer(run: Run, base: Path, tmp_path: Path) -> None:
    template = tmp_path / "tail.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}"
        "{% if m.role == 'assistant' %}{% generation %}.{% endgeneration %}{% endif %}{% endfor %} a tail to learn"
    )
    file = write(tmp_path / "long.jsonl", [{"instruction": "Count.", "output": "one, two, three, " * 9}] * 99)
    keys = [f"chat_template={template}", "train_on=all"]
    message = refused(run, config(base, file, *keys, "max_length=8"))
    enough = int(message.rpartition("max_length=")[2].split()[0])
    assert prepare(config(base, file, *keys, f"max_length={enough}"), run).counts.answers_cut == 0


def test_a_beginning_token_that_was_given_later_makes_other_rows(run: Run, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tokenizer = load_tokenizer(str(base))
    tokenizer.bos_token = "<|user|>"
    tokenizer.save_pretrained(other)
    write_conversations([as_conversation(ROWS[0], "row")], tmp_path / "rows.jsonl")
    with_and_without = [
        TokenRows(tokenize(tmp_path / "rows.jsonl", Recipe(str(folder), "plain", 64), tmp_path / "cache"))[0]
        for folder in (other, base)
    ]
    assert with_and_without[0].ids[1:] == with_and_without[1].ids


def test_a_tokenizer_of_another_model_is_refused(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    wrong = tmp_path / "wrong"
    load_tokenizer(str(base)).save_pretrained(wrong)
    model = AutoConfig.from_pretrained(base)
    model.vocab_size = 50
    model.save_pretrained(wrong)
    assert "the model knows 50 tokens, 0 to 49" in refused(run, config(wrong, data))


def test_rows_longer_than_a_table_of_positions_are_refused(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config

    short = tmp_path / "short"
    tokenizer = load_tokenizer(str(base))
    tokenizer.save_pretrained(short)
    GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=1, n_head=2).save_pretrained(short)
    assert "has learned 32 positions" in refused(run, config(short, data))
    assert "give max_length=32" in refused(run, config(short, data, "packing=true"))
    assert prepare(config(short, data, "max_length=32"), run).counts.rows_cut


def test_a_base_without_weights_or_a_tokenizer_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no weights: it needs"):
        look(config(base, data))
    half = shutil.copytree(base, tmp_path / "half")
    (half / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (half / "1.safetensors").touch()
    with pytest.raises(UserError, match="lacks 1 of 2 weight files: fetch 2"):
        look(config(half, data))
    (half / "2.safetensors").touch()
    look(config(half, data))
    for damage in (lambda: (half / "tokenizer.json").write_text("{"), (half / "tokenizer.json").unlink):
        damage()
        with pytest.raises(UserError, match=r"base: the tokenizer of .* cannot be read"):
            look(config(half, data))


def test_a_look_at_the_first_rows_finds_what_does_not_fit(base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(base, tmp_path / "base")
    (base / "model.safetensors").touch()  # looked for, not read
    with pytest.raises(UserError, match=r"bad\.jsonl:2: output is missing"):
        look(config(base, write(tmp_path / "bad.jsonl", [ROWS[0], {"instruction": "x"}])))
    with pytest.raises(UserError, match="no such template"):
        config(base, "chemistry", "chat_template=./no.jinja")
    with pytest.raises(UserError, match="needs the token"):
        look(config(base, "chemistry", "chat_template=chatml"))
    look(config(base, "chemistry"))


def test_sets_of_rows_that_nobody_uses_are_removed(run: Run, base: Path, data: Path) -> None:
    import os

    made: Prepared = prepare(config(base, data), run)
    os.utime(made.validation, (0, 0))
    recipe = Recipe(str(base), max_length=40)
    tokenize(run.artifact("train.jsonl"), recipe, cache_folder())
    assert made.train.exists()
    assert not made.validation.exists()
