"""torch.profiler around some steps of a training loop, on every rank: the writing half of ``workbench profile trace``.

    profile_steps(optimizer, TraceSteps(first=10, last=12), folder, rank, done=0)

The profiler follows the optimizer's own steps, so no loop knows of it. The step before the first is profiled and thrown
away: it bears what starting costs.
"""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from workbench.config import Config
from workbench.files import write_json
from workbench.marks import mark

MOST_STEPS = 50


class TraceSteps(Config):
    """Which optimizer steps to trace, counted from 1."""

    first: int = Field(ge=1, description="the first step that is traced")
    last: int = Field(ge=1, description="the last step that is traced")

    @model_validator(mode="after")
    def _in_order(self) -> "TraceSteps":
        if not 0 <= self.last - self.first < MOST_STEPS:
            raise ValueError(f"give first <= last, and at most {MOST_STEPS} steps: a trace is some MB a step")
        return self


def profile_steps(optimizer: Any, steps: TraceSteps, folder: Path, rank: int, done: int) -> None:
    """Profile ``steps`` of what ``optimizer`` steps, of which ``done`` were before; nothing if they are past.

    Writes ``folder/rank-N.json.gz``, a Chrome trace, ``rank-N.facts.json``, and for a card ``rank-N.memory.pickle``,
    for https://pytorch.org/memory_viz.
    """
    import torch
    from torch import profiler

    before = steps.first - 1 - done
    if before < 0:
        return
    cuda = torch.cuda.is_available()
    activities = [profiler.ProfilerActivity.CPU, *([profiler.ProfilerActivity.CUDA] if cuda else [])]
    folder.mkdir(parents=True, exist_ok=True)

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(folder / f"rank-{rank}.json.gz"))
        facts = {"rank": rank, "first": steps.first, "last": steps.last, "graph_breaks": graph_breaks()}
        if cuda:
            facts["card"] = torch.cuda.get_device_name()
            torch.cuda.memory._dump_snapshot(str(folder / f"rank-{rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        write_json(folder / f"rank-{rank}.facts.json", facts)

    schedule = profiler.schedule(
        wait=max(0, before - 1), warmup=min(1, before), active=steps.last - steps.first + 1, repeat=1
    )
    running = profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=write, record_shapes=True, profile_memory=True
    )
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    running.start()
    number = done

    def stepped(*_: Any) -> None:
        nonlocal number
        number += 1
        if steps.first - 1 <= number <= steps.last:
            mark("traced", number)
        running.step()
        if number == steps.last:
            running.stop()
            hook.remove()

    hook = optimizer.register_step_post_hook(stepped)


def graph_breaks() -> dict[str, int]:
    """Why torch.compile cut its graphs in this process so far, and how often."""
    import torch._dynamo.utils

    return {reason: int(count) for reason, count in torch._dynamo.utils.counters["graph_break"].items()}
