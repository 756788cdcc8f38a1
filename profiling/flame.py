"""``workbench profile flame``: where an actor's Python time goes, sampled by py-spy from outside, as a flame graph.

    workbench profile flame actor=my-actor seconds=10

For stages that a core bounds. The actor is not restarted or changed; py-spy pauses it for as long as each sample takes.
It reads another process's memory, which Linux allows to root, or to everybody by ``kernel.yama.ptrace_scope=0``.
"""

import difflib
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic import Field

from profiling.reasons import reason
from workbench.config import Config
from workbench.errors import Failure, UserError
from workbench.files import write_atomic
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_FRAMES = 3000


class FlameConfig(Config):
    """Which actor, and for how long."""

    actor: str = Field(description="an actor's name, its class, or its id")
    seconds: float = Field(10.0, gt=0, le=600, description="how long to sample, in whole seconds")
    rate: int = Field(100, ge=1, le=1000, description="samples a second")
    idle: bool = Field(False, description="also threads that wait")


def run(config: FlameConfig, run: Run) -> Summary:
    """Sample the actor. Raises UserError where there is none of the name, Failure where py-spy may not look."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = find_actor(config.actor)
    place = NodeAffinitySchedulingStrategy(found["node_id"], soft=False)
    sampling = ray.remote(num_cpus=0, max_retries=0)(sample).options(scheduling_strategy=place)
    seconds = max(1, round(config.seconds))  # py-spy knows whole ones
    run.say(f"sampling {found['class_name']} (process {found['pid']}) for {seconds} s")
    try:
        stacks = ray.get(sampling.remote(found["pid"], seconds, config.rate, config.idle))
    except ray.exceptions.RayError as error:
        raise Failure(f"{config.actor}: {reason(error)}") from None
    write_atomic(run.artifact("stacks.txt"), stacks)
    counts = read_stacks(stacks)
    total = sum(counts.values())
    if not total:
        raise Failure(
            f"{config.actor} ran no Python in {seconds} s: it waits, or is in native code without the "
            "interpreter; idle=true shows where it waits"
        )
    top = own_time(counts)
    note = f"{total:,} samples; artifacts/stacks.txt opens in https://www.speedscope.app."
    run.report.figure("Flame graph", icicle(counts), note=note)
    rows = [{"function": name, "percent": 100 * count / total} for name, count in top.most_common(20)]
    run.report.table("Where the time itself was spent", rows)
    return {
        "actor": found["name"] or found["class_name"],
        "process": found["pid"],
        "samples": total,
        "busy_percent": round(100 * total / (seconds * config.rate), 1),
        "most_time_in": top.most_common(1)[0][0],
    }


def find_actor(name: str) -> dict[str, Any]:
    """The one living actor of that name, class or id. Raises UserError where there is none, or are several,
    Failure where the dashboard does not answer."""
    import ray
    from ray.util.state import list_actors

    here = ray.get_runtime_context().gcs_address  # the State API would look for any Ray of this host

    try:
        alive = list_actors(here, filters=[("state", "=", "ALIVE")], limit=1000, raise_on_missing_output=False)
    except Exception as error:  # whatever it is of Ray's, requests' or the dashboard's
        raise Failure(f"Ray's dashboard does not tell its actors: {error}") from None
    actors = [
        {key: getattr(actor, key) for key in ("name", "class_name", "actor_id", "pid", "node_id")} for actor in alive
    ]
    matches = [actor for actor in actors if name in (actor["name"], actor["class_name"], actor["actor_id"])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(actor["actor_id"] for actor in matches)
        raise UserError(f"actor: '{name}' names {len(matches)} actors; give the id of one: {ids}")
    known = sorted({actor["name"] or actor["class_name"] for actor in actors})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(known) or 'none'}"
    raise UserError(f"actor: no actor '{name}' lives in this cluster{hint}")


def sample(process: int, seconds: int, rate: int, idle: bool) -> str:
    """py-spy's stacks of a process of this host: lines of frames with ';' between, and a count.

    Raises Failure with what to do where py-spy may not look.
    """
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "stacks")
        command = [
            str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(process), "--format", "raw",
            "--duration", str(seconds), "--rate", str(rate), "--output", str(out),
            *(["--idle"] if idle else []),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        except (OSError, subprocess.SubprocessError) as error:
            raise Failure(f"py-spy: {error}") from None
        if not out.exists():
            last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise Failure(f"py-spy: {last}; on Linux it needs root, or sysctl kernel.yama.ptrace_scope=0")
        return out.read_text()


def read_stacks(text: str) -> Counter[tuple[str, ...]]:
    """Samples by stack, the outermost frame first."""
    counts: Counter[tuple[str, ...]] = Counter()
    for line in text.splitlines():
        frames, _, count = line.rpartition(" ")
        if frames and count.isdigit():
            counts[tuple(frames.split(";"))] += int(count)
    return counts


def own_time(counts: Counter[tuple[str, ...]]) -> Counter[str]:
    """Samples by the innermost frame."""
    own: Counter[str] = Counter()
    for stack, count in counts.items():
        own[stack[-1]] += count
    return own


def icicle(counts: Counter[tuple[str, ...]]) -> "go.Figure":
    """All stacks as one figure: a box a frame, as wide as the samples in which it was open."""
    import plotly.graph_objects as go

    boxes: Counter[tuple[str, ...]] = Counter()
    for stack, count in counts.items():
        for depth in range(1, len(stack) + 1):
            boxes[stack[:depth]] += count
    kept = dict(boxes.most_common(MOST_FRAMES))  # a box is never wider than the one it stands on
    total = sum(counts.values())
    figure = go.Figure(
        go.Icicle(
            ids=["all", *(";".join(stack) for stack in kept)],
            labels=["all", *(stack[-1] for stack in kept)],
            parents=["", *(";".join(stack[:-1]) or "all" for stack in kept)],
            values=[total, *kept.values()],
            branchvalues="total",
            tiling={"orientation": "v"},
        )
    )
    figure.update_layout(height=700)
    return figure
