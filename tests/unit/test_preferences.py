"""Preference rows: read in each form, refused with their place, cut alike, counted where nothing can be learned."""

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.cli import main
from workbench.config import load
from workbench.errors import UserError
from workbench.runs import Run, open_run
from workloads.chat_templates import load_tokenizer
from workloads.dpo import DpoConfig
from workloads.encoding import Recipe
from workloads.preferences import encode_preferences, preferences, read_preferences
from workloads.prepared import batches_of, prepare
from workloads.tokenized import TokenRows
from workloads.tokenizer import train_tokenizer
from workloads.training.batches import IGNORE
from workloads.training.pairs import Pairs, halves

ASKED = {"role": "user", "content": "1 and 1?"}
RIGHT, WRONG = ({"role": "assistant", "content": content} for content in ("It is 2.", "It is 3."))
FORMS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "1 and 1?", "chosen": "It is 2.", "rejected": "It is 3."},
    "messages": {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]},
    "messages, the prompt in text": {"prompt": "1 and 1?", "chosen": [RIGHT], "rejected": [WRONG]},
    "whole conversations": {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "whole conversations and the prompt in text": {
        "prompt": "1 and 1?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG],
    },
}  # fmt: skip
ROWS = [
    {"prompt": "Add " + f"{n} and " * (n % 9) + "1.", "chosen": f"It is {n}.", "rejected": "No " * (1 + n % 3)}
    for n in range(60)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a model's config: weights are not looked at before training."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([json.dumps(row) for row in ROWS], 350, 512)
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        folder
    )
    return folder


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_prompt_and_two_answers(form: str, tmp_path: Path) -> None:
    (read,) = preferences([write(tmp_path / "p.jsonl", [FORMS[form]])])
    assert [(message.role, message.content) for message in read.prompt] == [("user", "1 and 1?")]
    assert (read.chosen, read.rejected, read.source) == ("It is 2.", "It is 3.", "p.jsonl:1")
    (tmp_path / "again.jsonl").write_text(read.line)
    assert list(read_preferences(tmp_path / "again.jsonl")) == [read]
    assert list(preferences([tmp_path / "again.jsonl"])) == [read]


def test_parquet_is_read_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{**FORMS["whole conversations"], "id": "a"}] * 2), tmp_path / "p.parquet")
    assert [row.source for row in preferences([tmp_path / "p.parquet"])] == ["a", "a"]


def test_a_data_set_by_name_is_read_too(base: Path, tmp_path: Path) -> None:
    import datasets

    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(saved)
    config = load(DpoConfig, None, [f"base={base}", f"data=hf:{saved}"])
    assert [row.source for row in preferences(config.data)][:2] == ["saved:1", "saved:2"]
    with pytest.raises(UserError, match="name a data set after hf:"):
        load(DpoConfig, None, [f"base={base}", "data=hf:"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "y"}, r"bad\.jsonl:2: no rejected: a row has prompt, chosen and rejected"),
        ({"instruction": "x", "output": "y"}, "no chosen and no rejected"),
        ({"chosen": "Human: x", "rejected": "Human: y"}, "no prompt, and chosen is an answer alone"),
        ({"chosen": [RIGHT], "rejected": [WRONG]}, "no prompt, and chosen is an answer alone"),
        ({"chosen": [ASKED, RIGHT], "rejected": [{**ASKED, "content": "?"}, WRONG]}, "differ before their last"),
        ({"chosen": [ASKED, RIGHT, ASKED], "rejected": [ASKED, WRONG]}, "chosen does not end with an answer"),
        ({"prompt": "x", "chosen": "y", "rejected": [{"role": "nobody", "content": ""}]}, "rejected: .*unknown role"),
        ({"prompt": [ASKED], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}, "two questions in a row"),
        ({"prompt": "x", "chosen": 5, "rejected": "y"}, "chosen is neither a text nor a list of messages"),
        ({"prompt": 5, "chosen": "x", "rejected": "y"}, "no prompt, and chosen is an answer alone"),
        (["x"], r"bad\.jsonl:2: a row is an object with prompt, chosen and rejected"),
    ],
)
def test_a_row_that_is_no_preference_is_refused_with_its_place(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(preferences([write(tmp_path / "bad.jsonl", [FORMS["text"], row])]))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rows in .*none\.jsonl"):
        list(preferences([write(tmp_path / "none.jsonl", [])]))


def encoded(base: Path, rows: list[dict[str, Any]], tmp_path: Path, most: int = 512) -> Any:
    read = list(preferences([write(tmp_path / "rows.jsonl", rows)]))
    return encode_preferences(read, load_tokenizer(str(base)), Recipe(str(base), max_length=most, pairs=True))


def test_the_answer_and_its_end_are_learned_after_one_prompt(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    (chosen, rejected), counts = encoded(base, [FORMS["text"]], tmp_path)
    asked = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, tokenize=False)
    for row, answer in ((chosen, "It is 2."), (rejected, "It is 3.")):
        learned = [label for label in row.labels if label != IGNORE]
        assert tokenizer.decode(learned) == answer + tokenizer.eos_token
        assert tokenizer.decode(row.ids[: -len(learned)]) == asked
    assert (counts.rows, counts.tokens) == (1, len(chosen.ids) + len(rejected.ids))


def test_over_the_limit_both_lose_the_same_beginning_of_their_prompt(base: Path, tmp_path: Path) -> None:
    row = {"prompt": "What is it? " * 20, "chosen": "It is a long answer.", "rejected": "No."}
    (chosen, rejected), counts = encoded(base, [row], tmp_path, most=24)
    assert len(chosen.ids) == 24
    prompts = [
        [i for i, label in zip(each.ids, each.labels, strict=True) if label == IGNORE] for each in (chosen, rejected)
    ]
    assert prompts[0] == prompts[1]
    assert len(rejected.ids) < 24
    assert (counts.rows_cut, counts.answers_cut) == (1, 0)
    assert counts.tokens + counts.tokens_lost == sum(len(r.ids) for r in encoded(base, [row], tmp_path)[0])


def test_an_answer_that_is_longer_alone_loses_its_end(base: Path, tmp_path: Path) -> None:
    row = {"prompt": "What is it?", "chosen": "It is a long answer. " * 9, "rejected": "No."}
    (chosen, rejected), counts = encoded(base, [row], tmp_path, most=16)
    assert [chosen.targets, len(chosen.ids)] == [15, 16]
    assert rejected.targets == len([label for label in rejected.labels if label != IGNORE]) > 1
    assert counts.answers_cut == 1
    assert encoded(base, [row], tmp_path, most=counts.shortest_answer + 1)[1].answers_cut == 0


def test_pairs_that_teach_nothing_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    alike = {"prompt": "x", "chosen": "same", "rejected": "same"}
    empty = {"prompt": "x", "chosen": "something", "rejected": " "}
    only_the_end = {"prompt": "x", "chosen": "No " * 40 + "yes", "rejected": "No " * 40 + "no"}
    rows, counts = encoded(base, [alike, empty, FORMS["text"], only_the_end], tmp_path, most=20)
    assert len(rows) == 2
    assert (counts.rows, counts.alike, counts.rows_dropped) == (1, 2, 1)


def config(base: Path, data: Path, *overrides: str) -> DpoConfig:
    small = ["steps=20", "batch_size=4", "warmup_steps=1", "max_length=64"]
    return load(DpoConfig, None, [f"base={json.dumps(str(base))}", f"data={json.dumps(str(data))}", *small, *overrides])


def open_a_run(base: Path, data: Path) -> Any:
    return open_run("train", "dpo", config(base, data))


def test_pairs_are_dealt_tokenized_and_asked(
    base: Path, tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "pairs.jsonl", [*ROWS, *[{**ROWS[0], "rejected": ROWS[0]["chosen"]}] * 60])
    run: Run
    with open_a_run(base, data) as run:
        given = config(base, data, "steps=100", "sample_every=1", "sample_prompts=2")
        made = prepare(given, run)
        parts = {
            part: list(read_preferences(run.artifact(f"{part}.jsonl"))) for part in ("train", "validation", "test")
        }
    assert [len(rows) for rows in parts.values()] == [108, 6, 6]
    assert made.counts.rows + made.counts.alike == 108
    assert (
        f"{made.counts.alike} rows whose chosen and rejected answers are alike were left out" in capsys.readouterr().err
    )
    pairs = batches_of(TokenRows(made.train), given).rows
    assert isinstance(pairs, Pairs)
    assert len(pairs) == made.counts.rows
    kept = [row for row in parts["train"] if row.chosen != row.rejected]
    tokenizer = load_tokenizer(str(base))
    for pair, row in zip(pairs, kept, strict=True):
        assert pair.sources == (row.source,)
        said = [tokenizer.decode([label for label in half.labels if label != IGNORE]) for half in halves(pair)]
        assert [text.removesuffix(tokenizer.eos_token) for text in said] == [row.chosen.strip(), row.rejected.strip()]
    assert pairs.lengths == [len(pair.ids) for pair in pairs]
    assert [answer for _, answer in made.questions] == [row.chosen for row in parts["validation"][:2]]


def test_data_that_teach_nothing_are_refused(base: Path, tmp_path: Path, runs_root: Path) -> None:
    alike = write(tmp_path / "alike.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "y"}] * 9)
    long = write(
        tmp_path / "long.jsonl", [{"prompt": "x", "chosen": f"{n} " * 30, "rejected": "no"} for n in range(30)]
    )
    with open_a_run(base, alike) as run:
        with pytest.raises(UserError, match="none of the training rows prefers an answer: in 7 chosen and rejected"):
            prepare(config(base, alike), run)
        with pytest.raises(UserError, match="max_length=8 is shorter than every answer"):
            prepare(config(base, long, "max_length=8"), run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=full", "give method=lora"),
        ("z_loss=0.1", "give z_loss=0"),
        ("label_smoothing=0.5", "less than 0.5"),
        ("beta=0", "greater than 0"),
        ("data=[]", "at least 1"),
        ("data=/no/such.jsonl", "no such file"),
        ("packing=true", "unknown key 'packing'"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_type(base: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(base, write(tmp_path / "p.jsonl", ROWS), override)
    with pytest.raises(UserError, match="label_smoothing=0 with loss=ipo"):
        config(base, tmp_path / "p.jsonl", "loss=ipo", "label_smoothing=0.1")


def test_the_command_ends_with_code_2_before_there_is_a_run(
    base: Path, tmp_path: Path, runs_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "x", "output": "y"}])
    with pytest.raises(SystemExit) as ended:
        main(["train", "dpo", f"base={json.dumps(str(base))}", f"data={json.dumps(str(bad))}"])
    assert ended.value.code == 2
    assert f"error: {bad}:1: no chosen and no rejected" in capsys.readouterr().err
    assert not runs_root.exists()
