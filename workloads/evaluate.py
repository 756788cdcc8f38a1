"""Compare a base model and what was tuned from it on held-out instructions.

    workbench train eval configs/demo/eval.yaml limit=500

Both models answer the same chat prompts greedily; of a conversation its last answer is asked for. A third column is no
model at all: each task's commonest answer in the training rows. Intervals are 95%: Wilson for a share, a bootstrap over
molecules for a difference.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from cluster.placement import place_here
from workbench.resources import Placed
from workbench.runs import Run, Summary
from workloads.chat_templates import load_tokenizer
from workloads.chemistry import commonest_answers
from workloads.instructions import (
    Instruction,
    load_instructions,
    read_questions,
    refuse_other_split,
    user_message,
    write_jsonl,
)
from workloads.scoring import is_right, paired_difference, partial_credit, wilson
from workloads.sources import CHEMISTRY, DataSource, ModelSource, check_model

SIDES = ("base", "tuned", "majority")

PARTIAL = "Partial: F1 of the words; of functional groups the overlap over the union."


class EvalConfig(Placed):
    """Config of ``train eval``."""

    amounts: ClassVar[tuple[str, str]] = ("cpus_per_model", "gpus_per_model")

    base: ModelSource = Field(description="model folder or hub name")
    tuned: ModelSource = Field(description="model or adapter folder")
    data: DataSource = Field(CHEMISTRY, description="chemistry, or the files that sft was given, of any form")
    split_seed: int = Field(0, description="as in sft: which molecules, or rows, are held out")
    limit: int = Field(600, ge=10, description="held-out questions")
    batch_size: int = Field(64, ge=1, description="questions answered at once")
    max_new_tokens: int = Field(24, ge=1, description="longest answer, in tokens")
    cpus_per_model: float = Field(1.0, gt=0, description="CPUs that Ray reserves for each model")
    gpus_per_model: float = Field(0.0, ge=0, le=1, description="0: answer on the CPU; 1: a CUDA card each")
    seed: int = Field(0, description="which questions are drawn, their phrasing, the bootstrap")


def check(config: EvalConfig) -> None:
    """Raise UserError for a model that is not to be had or has seen the test set, and for unreadable rows."""
    for name, source in {"base": config.base, "tuned": config.tuned}.items():
        check_model(name, source)
        refuse_other_split(source, config.data, config.split_seed)
    if config.data != CHEMISTRY:
        read_questions([Path(file) for file in config.data])


def run(config: EvalConfig, run: Run) -> Summary:
    """Draw the questions, let both models answer as Ray tasks, score, and report."""
    import ray

    check(config)
    placement = place_here(config.request(), run.say)
    for name, source in {"base": config.base, "tuned": config.tuned}.items():
        if Path(source).is_dir():
            run.input(name, path=Path(source))
        else:
            run.input(name, hub_name=source)
    data = load_instructions(config.data, split_seed=config.split_seed, seed=config.seed, limit=10**9, held_out=1)
    rows = data.test[: config.limit]
    majority = commonest_answers(data.train)
    write_jsonl(rows, run.artifact("questions.jsonl"))
    run.input("questions", path=run.artifact("questions.jsonl"), data=str(config.data), **data.facts)
    run.say(f"{len(rows)} held-out questions, {len(majority)} tasks; two models are answering")

    template = load_tokenizer(config.tuned).get_chat_template()  # for a base that was never asked anything
    remote = ray.remote(_answer).options(**placement.options())
    device = placement.device
    pending = [
        remote.remote(source, rows, device, config.batch_size, config.max_new_tokens, template)
        for source in (config.base, config.tuned)
    ]
    base, tuned = ray.get(pending)
    said = {"base": base, "tuned": tuned, "majority": [majority.get(row["task"], "") for row in rows]}
    scored = [
        {**row, **{side: said[side][i] for side in SIDES},
         **{f"{side}_right": is_right(row["task"], said[side][i], row["output"]) for side in SIDES},
         **{f"{side}_partial": partial_credit(row["task"], said[side][i], row["output"]) for side in SIDES}}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    run.artifact("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    summary = summarise(scored, config.seed)
    report(run, scored, summary, data.facts)
    return summary


def _answer(
    source: str, rows: list[Instruction], device: str, batch_size: int, max_new_tokens: int, template: str
) -> list[str]:
    from workloads.generate import greedy_answers

    return greedy_answers(
        source, rows, device=device, batch_size=batch_size, max_new_tokens=max_new_tokens, template=template
    )


def summarise(scored: list[dict[str, Any]], seed: int) -> Summary:
    """Accuracies, and the differences of tuned from base and from majority, each with its 95% interval."""
    right = {side: [bool(row[f"{side}_right"]) for row in scored] for side in SIDES}
    clusters = [row.get("smiles") or str(index) for index, row in enumerate(scored)]
    summary: Summary = {"questions": len(scored)}
    for side in SIDES:
        summary[f"accuracy_{side}"] = sum(right[side]) / len(scored)
        summary[f"partial_{side}"] = sum(row[f"{side}_partial"] for row in scored) / len(scored)
        summary[f"accuracy_{side}_low"], summary[f"accuracy_{side}_high"] = wilson(sum(right[side]), len(scored))
    for other in ("base", "majority"):
        low, high = paired_difference(right["tuned"], right[other], clusters, seed=seed)
        summary[f"tuned_minus_{other}"] = summary["accuracy_tuned"] - summary[f"accuracy_{other}"]
        summary[f"tuned_minus_{other}_low"], summary[f"tuned_minus_{other}_high"] = low, high
        summary[f"tuned_beats_{other}"] = low > 0
    return summary


def by_task(scored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task, in the order of the tuned model's lead over the commonest answer."""
    table = []
    for task in sorted({row["task"] for row in scored}):
        rows = [row for row in scored if row["task"] == task]
        entry: dict[str, Any] = {"task": task, "questions": len(rows)}
        for side in SIDES:
            right = sum(bool(row[f"{side}_right"]) for row in rows)
            entry[side] = right / len(rows)
            entry[f"{side} 95%"] = wilson(right, len(rows))
        for side in ("base", "tuned"):
            entry[f"{side}, partial"] = sum(row[f"{side}_partial"] for row in rows) / len(rows)
        table.append(entry)
    return sorted(table, key=lambda entry: entry["majority"] - entry["tuned"])


def report(run: Run, scored: list[dict[str, Any]], summary: Summary, facts: dict[str, Any]) -> None:
    """The verdict in words, accuracy by task, and examples that got better and worse."""
    from workloads.figures import accuracy_bars

    tasks = by_task(scored)
    run.report.heading("Is the tuned model better?")
    run.report.text("Verdict", verdict(summary, tasks))
    run.report.figure(
        "Accuracy by task", accuracy_bars(tasks), "Share of exact answers; bars are 95% Wilson intervals."
    )
    shown = [{k: f"{v[0]:.2f} to {v[1]:.2f}" if isinstance(v, tuple) else v for k, v in e.items()} for e in tasks]
    run.report.table("Accuracy by task", shown, PARTIAL)
    for title, better in (("Right only after tuning", True), ("Wrong only after tuning", False)):
        rows = [row for row in scored if row["base_right"] is not better and row["tuned_right"] is better]
        run.report.table(f"{title}: {len(rows)}", [_example(row) for row in rows[:8]])
    run.report.table("Still wrong", [_example(row) for row in scored if not row["tuned_right"]][:8])
    run.report.table("The data", [{"fact": key, "count": value} for key, value in facts.items()])


def _example(row: dict[str, Any]) -> dict[str, str]:
    return {"asked": user_message(row), "truth": row["output"], **{side: row[side] for side in SIDES}}


def verdict(summary: Summary, tasks: list[dict[str, Any]]) -> str:
    """By how much the tuned model is better, and where it is not."""
    lines = []
    for other, name in (("base", "the base"), ("majority", "each task's commonest training answer")):
        low, high = summary[f"tuned_minus_{other}_low"], summary[f"tuned_minus_{other}_high"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        points = summary[f"tuned_minus_{other}"] * 100
        lines.append(
            f"Tuned is {word} {name}: {summary['accuracy_tuned']:.1%} against {summary[f'accuracy_{other}']:.1%}, "
            f"a difference of {points:+.1f} points (95%: {low * 100:+.1f} to {high * 100:+.1f})."
        )
    if not summary["accuracy_base"]:
        lines.append("The base never answers in the asked form, so its share says nothing of what it knows.")
    for other in ("base", "majority"):
        behind = [entry["task"] for entry in tasks if entry["tuned"] <= entry[other]]
        lines.append(f"Tasks where tuned is not above {other}: {', '.join(behind) or 'none'}.")
    return "\n".join(lines)
