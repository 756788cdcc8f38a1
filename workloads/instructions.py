"""Instruction rows {instruction, input, output, task} become token ids whose labels cover the answer alone."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workloads.chemistry import check_split, instruction_rows, load_molecules, split_by_scaffold
from workloads.sources import CHEMISTRY

Instruction = dict[str, str]

SPLIT_FILE = "chemistry_split.json"
"""Beside a model's weights: which chemistry split it was trained on, so that no test molecule is trained on later."""


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels (-100 where nothing is learned) of a prompt with its answer; whether it was cut."""

    ids: list[int]
    labels: list[int]
    truncated: bool


def user_message(row: Instruction) -> str:
    """The input, then the instruction on a line of its own: a causal model reads the question knowing the input."""
    return f"{row['input']}\n{row['instruction']}" if row.get("input") else row["instruction"]


def prompt(row: Instruction, tokenizer: Any) -> str:
    """The chat prompt up to where the answer begins."""
    message = [{"role": "user", "content": user_message(row)}]
    text: str = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return text


def encode(row: Instruction, tokenizer: Any, max_length: int) -> Encoded:
    """Prompt, answer and end token; labels on the last two. Over ``max_length`` tokens the prompt loses its beginning
    and then the answer its end: an answer with half a question teaches more than a question without an answer."""
    asked = tokenizer(prompt(row, tokenizer), add_special_tokens=False).input_ids
    answer = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    truncated = len(asked) + len(answer) > max_length
    if truncated:
        answer = answer[: max_length - 1]
        asked = asked[len(asked) - (max_length - len(answer)) :]
    return Encoded(asked + answer, [-100] * len(asked) + answer, truncated)


def read_jsonl(files: Sequence[Path]) -> list[Instruction]:
    """Rows of JSONL files; input and task may be missing. Raises UserError with file and line of a bad row."""
    rows = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: not JSON: {error.msg}") from None
            missing = [key for key in ("instruction", "output") if not isinstance(row, dict) or not row.get(key)]
            if missing:
                raise UserError(f"{file}:{number}: no {' and no '.join(missing)}; a row has instruction, input, output")
            rows.append({"input": "", "task": "all", **{key: str(value) for key, value in row.items()}})
    if not rows:
        raise UserError(f"no rows in {', '.join(map(str, files))}")
    return rows


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

    Chemistry is split by scaffold, and the split is checked; JSONL rows are dealt 90 : 5 : 5 by ``split_seed``.
    Raises UserError for unreadable data.
    """
    if data == CHEMISTRY:
        molecules, dropped = load_molecules()
        split = split_by_scaffold(molecules, seed=split_seed)
        facts = {"molecules": len(molecules), **{f"in {part}": len(split[part]) for part in split}}
        facts |= {f"left out: {reason}": count for reason, count in dropped.items()} | check_split(split)
        if facts["molecules_shared"] or facts["scaffolds_shared"]:
            raise UserError(f"the split leaks: {facts}")  # cannot happen unless split_by_scaffold is wrong
        parts = {part: instruction_rows(split[part], seed=seed) for part in ("validation", "test")}
        parts["train"] = instruction_rows(split["train"], seed=seed)
    else:
        rows = read_jsonl([Path(file) for file in data])
        random.Random(f"split {split_seed}").shuffle(rows)
        cut = max(1, len(rows) // 20)
        parts = {"test": rows[:cut], "validation": rows[cut : 2 * cut], "train": rows[2 * cut :]}
        facts = {"rows": len(rows)}
    for part in parts.values():
        random.Random(f"order {seed}").shuffle(part)
    return InstructionData(parts["train"][:limit], parts["validation"][:held_out], parts["test"], facts)


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
