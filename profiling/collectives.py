"""``workbench profile collectives``: what the links between workers carry: all-reduce, all-gather, and so on, by size.

    workbench profile collectives configs/profile/collectives.yaml workers=2
    workbench profile collectives hosts="[system-a, linux-box]" resources="{gpu: any}"

NCCL between cards, gloo between CPUs. What comes out of every collective is checked.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from cluster.nodes import Node, member_nodes
from cluster.placement import Placement, place
from profiling.reasons import reason
from workbench.errors import Failure, UserError
from workbench.resources import Placed
from workbench.runs import Run, Summary

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
OPERATIONS: tuple[Operation, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")

ADVICE = (
    "cards without NVLink whose peer-to-peer is only half working hang so: try again with NCCL_P2P_DISABLE=1 in the "
    "hosts' environment, and look at 'workbench cluster doctor' (ACS, IOMMU); between hosts, let all "
    "ports through the firewall on the interface of NCCL_SOCKET_IFNAME, and try NCCL_IB_DISABLE=1"
)

START_SECONDS = 120.0
"""For a rank's process to start, its imports on a busy host, however soon a collective is taken to hang."""
ROOM = "other jobs hold what it asks for, or its host is slow: see 'workbench cluster status', or give a longer timeout"


def bus_factor(operation: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: how often a byte must cross the slowest link at least."""
    return (2.0 if operation == "all-reduce" else 1.0) * (ranks - 1) / ranks


class CollectivesConfig(Placed):
    """Between whom, and over which sizes."""

    workers: int = Field(2, ge=2, description="ranks; spread over 'hosts' in turn where those are given")
    hosts: list[str] = Field([], description="the hosts that take part; empty: wherever the workers fit")
    cpus_per_worker: float = Field(1.0, ge=0, description="CPUs that each rank reserves")
    gpus_per_worker: float = Field(0.0, ge=0, le=1, description="cards that each rank reserves; or use resources")
    operations: list[Operation] = Field(list(OPERATIONS), min_length=1, description="what to run")
    smallest: int = Field(1 << 10, ge=64, description="bytes of the smallest buffer")
    largest: int = Field(1 << 26, ge=64, description="bytes of the largest buffer")
    factor: int = Field(4, ge=2, description="between one size and the next")
    rounds: int = Field(5, ge=1, description="medians and spread are over these")
    repeats: int = Field(5, ge=1, description="collectives in a row in each round")
    timeout: float = Field(60.0, gt=0, description="seconds after which one collective hangs")

    @model_validator(mode="after")
    def _sizes_in_order(self) -> "CollectivesConfig":
        if self.largest < self.smallest:
            raise ValueError(f"largest ({self.largest}) is smaller than smallest ({self.smallest})")
        return self

    def sizes(self) -> list[int]:
        """Bytes of each buffer."""
        sizes = [self.smallest]
        while sizes[-1] * self.factor <= self.largest:
            sizes.append(sizes[-1] * self.factor)
        return sizes


def run(config: CollectivesConfig, run: Run) -> Summary:
    """Run every operation at every size on all ranks at once.

    Raises UserError for ranks that the cluster can never hold, Failure where one hangs, dies, or computes wrongly.
    """
    group = Group(config, run)
    rows: list[dict[str, Any]] = []
    try:
        for operation in config.operations:
            for size in config.sizes():
                rows.append(_row(operation, group.measure(operation, size), len(group.hosts)))
            largest = rows[-1]
            run.say(
                f"{operation} of {largest['bytes']:,} bytes: {largest['algorithm_gb_per_s']:.2f} GB/s, "
                f"bus {largest['bus_gb_per_s']:.2f} GB/s, spread {largest['spread_percent']:.0f}%"
            )
    finally:
        group.close()
        _report(run, rows, group)
    wrong = sum(row["wrong"] for row in rows)
    if wrong:
        raise Failure(f"{wrong} numbers came out wrong; see the report's column 'wrong': a link or a card is broken")
    best = {name: max(r["bus_gb_per_s"] for r in rows if r["operation"] == name) for name in config.operations}
    latency = {name: min(r["microseconds"] for r in rows if r["operation"] == name) for name in config.operations}
    return {
        "ranks": len(group.hosts),
        "hosts": ", ".join(dict.fromkeys(group.hosts)),
        "backend": group.backend,
        "wrong": wrong,
        **{f"{name}_bus_gb_per_s": round(value, 3) for name, value in best.items()},
        **{f"{name}_least_microseconds": round(value, 1) for name, value in latency.items()},
    }


def placements(config: CollectivesConfig, nodes: Sequence[Node]) -> list[Placement]:
    """Where each rank goes, in order. Raises UserError where a host, or the cluster, can never hold all its ranks."""
    if not config.hosts:
        return [place(config.request(), nodes, workers=config.workers)] * config.workers
    hosts = [config.hosts[rank % len(config.hosts)] for rank in range(config.workers)]
    placed = {
        host: place(config.request().model_copy(update={"host": host}), nodes, workers=ranks)
        for host, ranks in Counter(hosts).items()
    }
    return [placed[host] for host in hosts]


class Group:
    """Ranks as Ray actors, joined in one process group."""

    def __init__(self, config: CollectivesConfig, run: Run) -> None:
        import ray

        from profiling.collective_rank import Rank

        self._timeout = config.timeout
        self._config = config
        actor = ray.remote(Rank)
        placed = placements(config, member_nodes())
        for waits in dict.fromkeys(placement.waits for placement in placed if placement.waits):
            run.say(waits)
        self._ranks = [actor.options(**placement.options()).remote() for placement in placed]
        try:
            began = [rank.where.remote() for rank in self._ranks]
            places = self._ask("start", began, ROOM, seconds=max(self._timeout, START_SECONDS))
            self.hosts = [host for host, _, _ in places]
            first = f"{places[0][1]}:{places[0][2]}"
            run.say(f"{len(places)} ranks on {', '.join(dict.fromkeys(self.hosts))}")
            # the group's own limit is longer than any of ours, which name the rank that does not answer
            limit = config.timeout * (config.repeats + 2)
            joining = [
                rank.join.remote(number, len(places), first, places[number][1], limit)
                for number, rank in enumerate(self._ranks)
            ]
            self.backend = ", ".join(dict.fromkeys(self._ask("join the group", joining)))
        except BaseException:
            self.close()
            raise

    def measure(self, operation: str, size: int) -> list[dict[str, Any]]:
        """What each rank measured: ``bytes``, ``seconds`` of one collective by round, and how many came out ``wrong``.

        Raises Failure where a collective has not ended in time: alone within ``timeout``, in a round within ``timeout``
        beyond what as many take at the pace of the first.
        """
        what, repeats = f"{operation} of {size:,} bytes", self._config.repeats
        sizes = self._ask(what, [rank.prepare.remote(operation, size) for rank in self._ranks])
        before = self._ask(what, [rank.check.remote() for rank in self._ranks])
        alone = self._ask(what, [rank.measure.remote(1) for rank in self._ranks])
        limit = self._timeout + repeats * max(alone)
        rounds = [
            self._ask(what, [rank.measure.remote(repeats) for rank in self._ranks], seconds=limit)
            for _ in range(self._config.rounds)
        ]
        after = self._ask(what, [rank.check.remote() for rank in self._ranks])
        return [
            {"bytes": sizes[rank], "seconds": [row[rank] for row in rounds], "wrong": before[rank] + after[rank]}
            for rank in range(len(self._ranks))
        ]

    def _ask(self, what: str, asked: list[Any], advice: str = ADVICE, seconds: float = 0.0) -> list[Any]:
        """The answers of all ranks within ``seconds``, or ``timeout``. Raises Failure with ``advice``."""
        import ray

        seconds = seconds or self._timeout
        done, waiting = ray.wait(asked, num_returns=len(asked), timeout=seconds)
        try:
            for one in done:
                ray.get(one)
        except ray.exceptions.RayError as error:
            said = reason(error, line=-1)
            raise Failure(f"{what}: rank {asked.index(one)} failed: {said}; {advice}") from None
        if waiting:
            late = ", ".join(str(asked.index(one)) for one in waiting)
            raise Failure(f"{what} hangs: rank {late} has not answered for {seconds:g} s; {advice}")
        return list(ray.get(asked))

    def close(self) -> None:
        """End the ranks' processes, whatever they are in."""
        import ray

        for rank in self._ranks:
            ray.kill(rank)


def _row(operation: str, measured: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """Time is the mean over ranks, as nccl-tests has it; median and spread (quartiles) are over rounds."""
    seconds = np.mean([one["seconds"] for one in measured], axis=0)
    low, median, high = np.percentile(seconds, [25, 50, 75])
    size = measured[0]["bytes"]
    return {
        "operation": operation,
        "bytes": size,
        "microseconds": float(median * 1e6),
        "spread_percent": float(100 * (high - low) / median),
        "algorithm_gb_per_s": float(size / median / 1e9),
        "bus_gb_per_s": float(size / median / 1e9 * bus_factor(operation, ranks)),
        "wrong": sum(one["wrong"] for one in measured),
    }


def _report(run: Run, rows: list[dict[str, Any]], group: Group) -> None:
    import plotly.graph_objects as go

    if not rows:
        return
    figure = go.Figure()
    for name in dict.fromkeys(row["operation"] for row in rows):
        of = [row for row in rows if row["operation"] == name]
        figure.add_scatter(
            x=[row["bytes"] for row in of], y=[row["bus_gb_per_s"] for row in of], name=name, mode="lines+markers"
        )
    figure.update_layout(xaxis_type="log", xaxis_title="bytes", yaxis_title="bus bandwidth, GB/s")
    note = f"{group.backend}; ranks on {', '.join(group.hosts)}. Bandwidths as nccl-tests defines them."
    run.report.figure("Bus bandwidth by size", figure, note=note)
    run.report.table("Collectives", rows, note="Medians over the rounds; spread is between their quartiles.")


def check(config: CollectivesConfig) -> None:
    """Raise UserError for hosts that are named twice: ranks go to them in turn."""
    twice = {host for host in config.hosts if config.hosts.count(host) > 1}
    if twice:
        raise UserError(f"hosts names {', '.join(sorted(twice))} twice: 'workers' says how many ranks there are")
