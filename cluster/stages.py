"""The stages of ``workbench demo``: which commands, on whose results, in which order.

A stage's arguments may hold ``{key}``, the run folder of an earlier command, written as ``runs/...`` so that the
printed command can be typed as it is, and ``{port}``, where the endpoint listens.
"""

import importlib.util
import sys
from dataclasses import dataclass

QUESTION = "how do I read a parquet file in parallel"
PORT = 8000
"""Where the endpoint listens, if nothing else does."""
ENDPOINT = "base_url=http://127.0.0.1:{port}/v1"


@dataclass(frozen=True)
class Step:
    """One command of a stage. ``key`` names its run for later stages; ``seeded`` passes the demo's seed on, and a step
    that ``searches`` is redone when the collection was. ``tables`` are the titles of those on the demo's page."""

    key: str
    command: list[str]
    seeded: bool = False
    searches: bool = False
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A titled group of steps. ``skip`` says why it cannot run here, if it cannot; a ``live`` stage leaves something
    running between its steps, so it is redone as a whole."""

    title: str
    steps: list[Step]
    live: bool = False
    skip: str = ""


def stages() -> list[Stage]:
    """All stages that run as jobs; the profiler brackets them and the report follows."""
    return [
        Stage(
            "Documents", [Step("audit", ["data", "audit", "configs/demo/audit.yaml"], tables=("What is kept", "Found"))]
        ),
        Stage(
            "Embed",
            [
                Step("embed", ["data", "embed", "configs/demo/embed.yaml", "documents={audit}/artifacts/documents"]),
                Step("search", ["data", "search", "configs/demo/search.yaml", QUESTION], searches=True),
            ],
        ),
        Stage(
            "Base model",
            [
                Step(
                    "pretrain",
                    ["train", "pretrain", "configs/demo/pretrain.yaml", "documents={audit}/artifacts/documents"],
                    seeded=True,
                    tables=("Samples",),
                )
            ],
        ),
        Stage(
            "Fine-tune",
            [
                Step(
                    "sft",
                    ["train", "sft", "configs/demo/sft.yaml", "base={pretrain}/artifacts/model"],
                    seeded=True,
                )
            ],
        ),
        Stage(
            "Sweep",
            [
                Step(
                    "tune",
                    ["tune", "run", "configs/demo/sweep.yaml", "config.base={pretrain}/artifacts/model"],
                    seeded=True,
                    tables=("Every trial",),
                )
            ],
        ),
        Stage(
            "Evaluate",
            [
                Step(
                    "eval",
                    [
                        *["train", "eval", "configs/demo/eval.yaml", "base={pretrain}/artifacts/model"],
                        "tuned={tune}/artifacts/best/merged",
                    ],
                    seeded=True,
                    tables=("Accuracy by task", "Right only", "Wrong only", "Still wrong"),
                )
            ],
        ),
        Stage(
            "Serve",
            [
                Step(
                    "serve",
                    [
                        *["serve", "up", "configs/demo/serve.yaml", "models.0.source={pretrain}/artifacts/model"],
                        "models.1.source={tune}/artifacts/best/merged",
                        "port={port}",
                    ],
                ),
                Step("ask", ["serve", "ask", "configs/demo/ask.yaml", ENDPOINT, QUESTION], searches=True),
                Step(
                    "loadtest",
                    ["serve", "loadtest", "configs/demo/loadtest.yaml", ENDPOINT, "prompts={sft}/artifacts/test.jsonl"],
                    tables=("Load",),
                ),
                Step("down", ["serve", "down"]),
            ],
            live=True,
            skip=_why_no_vllm(),
        ),
    ]


def _why_no_vllm() -> str:
    if importlib.util.find_spec("vllm") is not None:
        return ""
    if sys.platform == "darwin":
        return "vLLM has no macOS build; serve from a Linux machine of the cluster"
    return "vLLM is not installed; install it with: pip install -e '.[cpu]' (or '.[cuda]' with an NVIDIA card)"
