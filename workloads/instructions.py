"""Questions with one right answer: instruction rows {instruction, input, output, task} of chemistry, and conversations
of files, of which the last answer is asked for."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.conversations import Message
from workbench.errors import UserError
from workloads.chemistry import check_split, instruction_rows, load_molecules, split_by_scaffold
from workloads.conversations import Conversation, with_records
from workloads.sources import CHEMISTRY

Instruction = dict[str, Any]
"""Texts, and for a conversation its ``turns`` up to the answer."""

SPLIT_FILE = "chemistry_split.json"
"""Beside a model's weights: which chemistry split it was trained on, so that no test molecule is trained on later."""


def user_message(row: Instruction) -> str:
    """The instruction, and the input below it, as ``workbench.conversations`` reads an Alpaca row."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input", "").strip() else row["instruction"]


def prompt(row: Instruction, tokenizer: Any) -> str:
    """The chat prompt up to where the answer begins."""
    turns = row.get("turns") or [{"role": "user", "content": user_message(row)}]
    text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text


def as_conversation(row: Instruction, source: str) -> Conversation:
    """The question and its answer as turns."""
    return Conversation([Message("user", user_message(row)), Message("assistant", row["output"])], source)


def read_questions(files: Sequence[Path]) -> list[Instruction]:
    """The rows of files in any form that ``train sft`` takes: the turns up to the last answer, the last user's message
    as ``instruction``, and that answer as ``output``, empty where a row has none. No task is "all". Raises UserError
    with file and row of a bad one."""
    return [_question(conversation, record) for conversation, record in with_records(files)]


def _question(conversation: Conversation, record: Mapping[str, Any]) -> Instruction:
    turns = conversation.turns
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    before = turns[: answers[-1]] if answers else turns
    asked = [turn["content"] for turn in before if turn["role"] == "user"]
    return {
        "instruction": asked[-1] if asked else "", "input": "", "turns": before, "source": conversation.source,
        "output": turns[answers[-1]]["content"].strip() if answers else "", "task": str(record.get("task") or "all"),
    }  # fmt: skip


@dataclass(frozen=True)
class InstructionData:
    """Train, validation and test rows, and ``facts`` about them for the report and inputs.json."""

    train: list[Instruction]
    validation: list[Instruction]
    test: list[Instruction]
    facts: dict[str, Any]


def load_instructions(
    data: str | list[Path], *, split_seed: int, seed: int, limit: int, held_out: int
) -> InstructionData:
    """Up to ``limit`` train rows and ``held_out`` rows of each other part, in an order drawn from ``seed``.

    Chemistry is split by scaffold, and the split is checked; rows of files are dealt 90 : 5 : 5 by ``split_seed``, and
    those without an answer are then left out. Raises UserError for unreadable data, and where no question is left.
    """
    if data == CHEMISTRY:
        molecules, dropped = load_molecules()
        split = split_by_scaffold(molecules, seed=split_seed)
        facts = {"molecules": len(molecules), **{f"in {part}": len(split[part]) for part in split}}
        facts |= {f"left out: {reason}": count for reason, count in dropped.items()} | check_split(split)
        if facts["molecules_shared"] or facts["scaffolds_shared"]:
            raise UserError(f"the split leaks: {facts}")  # cannot happen unless split_by_scaffold is wrong
        parts = {part: _molecule_first(instruction_rows(split[part], seed=seed)) for part in split}
    else:
        rows = read_questions([Path(file) for file in data])
        random.Random(f"split {split_seed}").shuffle(rows)
        cut = max(1, len(rows) // 20)
        parts = {"test": rows[:cut], "validation": rows[cut : 2 * cut], "train": rows[2 * cut :]}
        answered = {name: [row for row in part if row["output"]] for name, part in parts.items()}
        facts = {"rows": len(rows), "without an answer": len(rows) - sum(map(len, answered.values()))}
        parts = answered
        if not parts["test"]:
            raise UserError(f"data: of {len(rows)} rows none with an answer is held out: give more rows, or the roles")
    for part in parts.values():
        random.Random(f"order {seed}").shuffle(part)
    return InstructionData(parts["train"][:limit], parts["validation"][:held_out], parts["test"], facts)


def _molecule_first(rows: Sequence[Instruction]) -> list[Instruction]:
    """The molecule, then the question on a line of its own: a causal model reads the question knowing the molecule."""
    return [{**row, "instruction": f"{row['input']}\n{row['instruction']}", "input": ""} for row in rows]


def write_jsonl(rows: Sequence[Instruction], file: Path) -> None:
    """One JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def refuse_other_split(base: str, data: str | list[Path], split_seed: int) -> None:
    """Raises UserError where ``base`` was pretrained on another chemistry split: it has seen this one's test set."""
    file = Path(base) / SPLIT_FILE
    if data != CHEMISTRY or not file.is_file():
        return
    pretrained = json.loads(file.read_text())["split_seed"]
    if pretrained != split_seed:
        raise UserError(
            f"{base} was trained on the chemistry split of seed {pretrained}, so the test molecules of split seed "
            f"{split_seed} are known to it: give split_seed={pretrained}"
        )
