"""``workbench profile pcie``: what the links and memories of each host carry, by size, and what they should.

    workbench profile pcie configs/profile/pcie.yaml

On a host with NVIDIA cards: host to card and back, both at once, within each card, and between each pair. On one
without, what there is: its memory, and a Mac's GPU. Every copied buffer is compared with its source.
"""

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from cluster.nodes import Node, member_nodes
from cluster.placement import Placement, place
from profiling.reasons import reason
from profiling.shares import link_bytes
from workbench.config import Config
from workbench.errors import Failure, UserError
from workbench.resources import ResourceRequest
from workbench.runs import Run, Summary

AGREES_PERCENT = 5.0


class PcieConfig(Config):
    """Which hosts, and which sizes."""

    hosts: list[str] = Field([], description="the hosts to measure; empty: all")
    smallest: int = Field(1 << 10, ge=1, description="bytes of the smallest copy")
    largest: int = Field(1 << 30, ge=1, description="bytes of the largest copy")
    factor: int = Field(8, ge=2, description="between one size and the next")
    rounds: int = Field(7, ge=1, description="medians and spread are over these")
    nvbandwidth: bool = Field(True, description="run nvbandwidth beside it where it is installed")
    timeout: float = Field(900.0, gt=0, description="seconds after which a host hangs, from when it is free to measure")

    @model_validator(mode="after")
    def _sizes_in_order(self) -> "PcieConfig":
        if self.largest < self.smallest:
            raise ValueError(f"largest ({self.largest}) is smaller than smallest ({self.smallest})")
        return self

    def sizes(self) -> list[int]:
        """Bytes of each copy."""
        sizes = [self.smallest]
        while sizes[-1] * self.factor < self.largest:
            sizes.append(sizes[-1] * self.factor)
        return sizes if self.largest == self.smallest else [*sizes, self.largest]


def run(config: PcieConfig, run: Run) -> Summary:
    """Measure host after host: several at once would share what lies between them.

    Raises UserError for a host that is not there, Failure where bytes arrived wrong, or a host hangs or dies.
    """
    nodes = member_nodes()
    known = [node.host for node in nodes]
    for host in config.hosts:
        if host not in known:
            raise UserError(f"hosts: no host '{host}' in this cluster; there are {', '.join(known)}")
    measured = [_measure(node, nodes, config, run) for node in nodes if not config.hosts or node.host in config.hosts]
    rows = [row for host in measured for row in host["table"]]
    wrong = sum(row["wrong"] for row in rows)
    if wrong:
        raise Failure(f"{wrong} bytes arrived wrong; see the report's column 'wrong': a link or a memory is broken")
    best = {f"{row['host']}: {row['way']}": row["gb_per_s"] for row in rows if row["bytes"] == config.sizes()[-1]}
    return {
        "hosts": ", ".join(host["host"] for host in measured),
        "copies": len(rows),
        "wrong": wrong,
        **{f"{name}_gb_per_s": round(value, 2) for name, value in best.items()},
    }


class Worker:
    """A process on the host, which holds its cards while it measures; a Ray actor."""

    def ready(self) -> None:
        """Answer: what was asked for is held."""

    def copies(self, sizes: list[int], rounds: int) -> dict[str, Any]:
        """``profiling.copies.measure_host``."""
        from profiling.copies import measure_host

        return measure_host(sizes, rounds)

    def nvbandwidth(self) -> dict[str, Any]:
        """``profiling.nvbandwidth.run_nvbandwidth``."""
        from profiling.nvbandwidth import run_nvbandwidth

        return run_nvbandwidth()


def _measure(node: Node, nodes: list[Node], config: PcieConfig, run: Run) -> dict[str, Any]:
    import ray

    placement = _placement(node, nodes)
    if placement.waits:
        run.say(placement.waits)
    worker = ray.remote(Worker).options(**placement.options()).remote()
    theirs: dict[str, Any] = {"missing": "not asked for"}
    try:
        ray.get(worker.ready.remote())
        run.say(f"measuring {node.host}")
        host = ray.get(worker.copies.remote(config.sizes(), config.rounds), timeout=config.timeout)
        if config.nvbandwidth and host["cards"]:
            theirs = _theirs(worker, config.timeout)
    except ray.exceptions.GetTimeoutError:
        raise Failure(
            f"{node.host} has not answered for {config.timeout:g} s: a card waits for another process, or a copy "
            "between cards hangs (try NCCL_P2P_DISABLE=1 for jobs, and look at IOMMU and ACS)"
        ) from None
    except ray.exceptions.RayError as error:
        raise Failure(f"{node.host}: {reason(error)}") from None
    finally:
        ray.kill(worker)
    host["table"] = [_row(host, row, theirs) for row in host["rows"]]
    _report(run, host, theirs, config.sizes()[-1])
    for row in host["table"]:
        if row["bytes"] == config.sizes()[-1]:
            of = f", {row['percent_of_link']:.0f}% of its link" if row["percent_of_link"] else ""
            run.say(f"{node.host}: {row['way']}: {row['gb_per_s']:.2f} GB/s{of}, spread {row['spread_percent']:.0f}%")
    return dict(host)


def _theirs(worker: Any, seconds: float) -> dict[str, Any]:
    """What nvbandwidth says; ``missing`` says why it does not: our copies count without it."""
    import ray

    try:
        return dict(ray.get(worker.nvbandwidth.remote(), timeout=seconds))
    except ray.exceptions.RayError as error:
        return {"missing": f"nvbandwidth: {reason(error)}"}


def _placement(node: Node, nodes: list[Node]) -> Placement:
    """All cards of the host, so that no other job uses them meanwhile; without cards, a CPU there."""
    plain = int(node.total.get("GPU", 0))
    if not node.cards and plain:
        return place(ResourceRequest(gpus=plain, host=node.host if len(nodes) > 1 else ""), nodes)
    if node.cards:
        return place(ResourceRequest.model_validate({"gpus": f"all on {node.host}"}), nodes)
    return place(ResourceRequest(cpu=1, host=node.host if len(nodes) > 1 else ""), nodes)


def _row(host: dict[str, Any], row: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    low, median, high = np.percentile(row["seconds"], [25, 50, 75])
    rate = row["moved"] / median / 1e9
    limit = _limit(host, row["way"])
    return {
        "host": host["host"],
        "way": row["way"],
        "bytes": row["bytes"],
        "microseconds": float(median * 1e6),
        "gb_per_s": float(rate),
        "spread_percent": float(100 * (high - low) / median),
        "link_gb_per_s": limit,
        "percent_of_link": 100 * rate / limit if limit else None,
        "nvbandwidth_gb_per_s": theirs.get(row["way"]),
        "wrong": row["wrong"],
    }


def _limit(host: dict[str, Any], way: str) -> float | None:
    """GB/s of the link that the card of a way has, in both directions where both are used; None where not known."""
    for card, link in host["links"].items():
        if "width" in link and (
            f"to card {card}," in way or f"card {card} to host" in way or f"and card {card}," in way
        ):
            if "card" in way.replace(f"card {card}", "", 1):
                continue  # between two cards
            carried = link_bytes(link["generation"], link["width"])
            return carried and carried / 1e9 * (2 if "both" in way else 1)
    return None


def _report(run: Run, host: dict[str, Any], theirs: dict[str, Any], largest: int) -> None:
    import plotly.graph_objects as go

    name = host["host"]
    cards = ", ".join(f"card {index} is a {card}" for index, card in host["cards"].items())
    links = "".join(
        f"; the link of card {card} ran at generation {link['generation']} x{link['width']} of generation "
        f"{link['generation_max']} x{link['width_max']}"
        for card, link in host["links"].items()
        if "width" in link
    )
    note = cards + links if cards else "No NVIDIA card: what there is was measured."
    if "missing" in theirs:
        note += f" {theirs['missing']}."
    run.report.heading(name, note)
    figure = go.Figure()
    for way in dict.fromkeys(row["way"] for row in host["table"]):
        of = [row for row in host["table"] if row["way"] == way]
        figure.add_scatter(x=[r["bytes"] for r in of], y=[r["gb_per_s"] for r in of], name=way, mode="lines+markers")
    figure.update_layout(xaxis_type="log", xaxis_title="bytes of a copy", yaxis_title="GB/s")
    run.report.figure(f"Bandwidth by size on {name}", figure)
    if host["cards"]:
        run.report.figure(f"Bandwidth between memories of {name}", heat_map(host, largest), note="GB/s, largest copy.")
    off = [
        {"way": row["way"], "ours": row["gb_per_s"], "nvbandwidth": row["nvbandwidth_gb_per_s"]}
        for row in host["table"]
        if row["bytes"] == largest and row["nvbandwidth_gb_per_s"]
        and abs(row["gb_per_s"] / row["nvbandwidth_gb_per_s"] - 1) > AGREES_PERCENT / 100
    ]  # fmt: skip
    if off:
        run.report.table("Where nvbandwidth differs by more than 5%", off)
    run.report.table(f"Copies on {name}", host["table"], note="Medians over the rounds; spread between quartiles.")
    if host["left_out"]:
        run.report.text("Left out", "\n".join(host["left_out"]))


def heat_map(host: dict[str, Any], size: int) -> Any:
    """GB/s from each memory (rows) to each (columns) at one size: the best way of each pair."""
    import plotly.graph_objects as go

    places = ["host", *(f"card {index}" for index in host["cards"])]
    grid = np.full((len(places), len(places)), np.nan)
    for row in host["table"]:
        ends = row["way"].partition(",")[0].removeprefix("within ").split(" to ")
        if row["bytes"] == size and all(end in places for end in ends):
            at = places.index(ends[0]), places.index(ends[-1])
            grid[at] = np.nanmax([grid[at], row["gb_per_s"]])
    figure = go.Figure(go.Heatmap(z=grid, x=places, y=places, texttemplate="%{z:.1f}", colorscale="Blues"))
    figure.update_layout(xaxis_title="to", yaxis_title="from")
    return figure
