"""From text to token ids: the tokenizer, the prompt, and labels that cover the answer alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workloads.corpus import molecule_records, read_documents, sequences
from workloads.encoding import Recipe, encode
from workloads.instructions import (
    SPLIT_FILE,
    as_conversation,
    load_instructions,
    prompt,
    read_questions,
    refuse_other_split,
    user_message,
)
from workloads.tokenizer import END, train_tokenizer
from workloads.training.batches import IGNORE

ROW = {"instruction": "Count the rings.", "input": "c1ccccc1", "output": "1", "task": "rings"}
TEXTS = ["CC(=O)Oc1ccccc1C(=O)O\nrings: 1; groups: acid, ester", "Read a Parquet file in parallel.", "Clc1ccc(Br)cc1"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS * 20, 400, 512)


@pytest.mark.parametrize("text", [*TEXTS, "naïve  café\n\tx == 3.14 # Größe", "C[C@@H](N)C(=O)O", "日本"])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_and_capitals_are_tokens_of_their_own(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("CCO12").input_ids)
    assert tokens == ["C", "C", "O", "1", "2"]


def test_a_tokenizer_comes_back_from_disk_with_its_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert prompt(ROW, loaded) == "<|user|>Count the rings.\n\nc1ccccc1<|end|><|assistant|>"
    assert loaded.eos_token == END
    assert loaded(prompt(ROW, loaded)).input_ids == tokenizer(prompt(ROW, tokenizer)).input_ids


@pytest.mark.parametrize("length", [128, 24, 8])
def test_chemistry_is_learned_as_prompt_then_answer_then_end(tokenizer: Any, length: int) -> None:
    """Prompt and answer tokenized apart, cut at the prompt's beginning: what recorded losses were made with."""
    data = load_instructions("chemistry", split_seed=0, seed=0, limit=40, held_out=1)
    rows, counts = encode([as_conversation(row, "") for row in data.train], tokenizer, Recipe("", max_length=length))
    cut = 0
    for row, made in zip(data.train, rows, strict=True):
        asked = tokenizer(prompt(row, tokenizer), add_special_tokens=False).input_ids
        answer = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id][: length - 1]
        cut += len(asked) + len(answer) > length
        asked = asked[max(0, len(asked) + len(answer) - length) :]
        assert made.ids == asked + answer
        assert made.labels == [IGNORE] * len(asked) + answer
    assert counts.rows_cut >= cut
    assert (cut > 0) == (length < 128)


def test_chemistry_asks_with_the_molecule_before_the_question(tokenizer: Any) -> None:
    data = load_instructions("chemistry", split_seed=0, seed=0, limit=1, held_out=1)
    (row,) = data.train
    molecule, question = user_message(row).split("\n")
    assert molecule == row["smiles"]
    assert question


def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + '\n{"instruction": "x"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: output is missing"):
        read_questions([file])
    file.write_text("{")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not JSON"):
        read_questions([file])


def test_rows_of_a_file_are_dealt_into_parts_that_share_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"q{i}", "output": str(i)}) + "\n" for i in range(100)))
    data = load_instructions([file], split_seed=0, seed=0, limit=1000, held_out=1000)
    parts = [{row["instruction"] for row in part} for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [90, 5, 5]
    assert len(set.union(*parts)) == 100


ALPACA = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "1 and 1?"}, {"from": "gpt", "value": "2"},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes. "},
    ]
}  # fmt: skip
CHAT = {"task": "sums", "messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": ""}]}


def test_a_question_of_any_form_is_the_turns_up_to_the_last_answer(tokenizer: Any, tmp_path: Path) -> None:
    rows = []
    for name, row in {"alpaca": ALPACA, "sharegpt": SHAREGPT, "chat": CHAT}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        rows += read_questions([tmp_path / f"{name}.jsonl"])
    assert [row["output"] for row in rows] == ["2", "Yes.", ""]
    assert [row["task"] for row in rows] == ["all", "all", "sums"]
    assert rows[0]["instruction"] == "Add.\n\n1 and 1"
    assert prompt(rows[0], tokenizer) == prompt(ALPACA, tokenizer)
    assert prompt(rows[1], tokenizer).endswith("2<|end|><|user|>Sure?<|end|><|assistant|>")


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    silent = {"conversations": [*SHAREGPT["conversations"][:2], {"from": "gpt", "value": " "}]}
    some = [SHAREGPT if number % 2 else silent for number in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    data = load_instructions([file], split_seed=0, seed=0, limit=1000, held_out=1000)
    assert data.facts == {"rows": 100, "without an answer": 50}
    assert len(data.train) + len(data.validation) + len(data.test) == 50
    file.write_text("".join(json.dumps(CHAT) + "\n" for _ in range(9)))
    with pytest.raises(UserError, match="of 9 rows none with an answer is held out"):
        load_instructions([file], split_seed=0, seed=0, limit=1000, held_out=1000)


def test_chemistry_says_that_its_parts_share_nothing() -> None:
    data = load_instructions("chemistry", split_seed=0, seed=0, limit=50, held_out=20)
    assert data.facts["molecules_shared"] == data.facts["scaffolds_shared"] == 0
    assert (len(data.train), len(data.validation)) == (50, 20)
    assert not {row["smiles"] for row in data.train} & {row["smiles"] for row in data.test}


def test_a_base_that_saw_another_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / SPLIT_FILE).write_text('{"split_seed": 3}')
    refuse_other_split(str(tmp_path), "chemistry", 3)
    with pytest.raises(UserError, match="give split_seed=3"):
        refuse_other_split(str(tmp_path), "chemistry", 0)


def test_a_record_states_the_answers_of_its_molecule() -> None:
    from rdkit import Chem

    from workloads.chemistry import Molecule, answers

    records = molecule_records([Molecule("CCO", "")], copies=6, randomised=0.5, seed=0)
    spellings = [record.split("\n")[0] for record in records]
    assert len(set(spellings)) > 1
    for record, spelling in zip(records, spellings, strict=True):
        assert Chem.CanonSmiles(spelling) == "CCO"
        stated = dict(fact.split(": ") for fact in record.split("\n")[1].split("; "))
        assert stated == answers("CCO")


def test_each_text_is_a_sequence_of_its_own_and_long_ones_are_cut(tokenizer: Any) -> None:
    whole = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    pieces = sequences(TEXTS, tokenizer, 16)
    assert max(map(len, pieces)) <= 16
    assert [i for piece in pieces for i in piece] == [i for ids in whole for i in ids]
    assert sequences(TEXTS, tokenizer, 10_000) == whole


def test_documents_are_those_that_the_audit_kept(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"text": ["abcdef", "dropped", "xyz"], "keep": [True, False, True]}), tmp_path / "p.parquet"
    )
    assert read_documents(tmp_path, limit=10, characters=4) == ["abcd", "xyz"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no Parquet file"):
        read_documents(tmp_path / "empty", limit=10, characters=4)
