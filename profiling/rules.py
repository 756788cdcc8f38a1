"""What a recording shows to be wrong, in words with the evidence: a table of rules, and each rule one function.

for finding in findings(recording):
    print(finding.host, finding.says, finding.evidence)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from profiling.recorder import PART_SECONDS
from profiling.shares import IDLE_PERCENT, card_shares, link_bytes, share
from profiling.trace import HostTrace, Recording

GIB = 2.0**30


@dataclass(frozen=True)
class Finding:
    """One thing that a rule saw: on which host, in words, by which figures, and what to try."""

    rule: str
    host: str
    says: str
    evidence: str
    advice: str


Seen = Iterator[tuple[str, str]]
"""What a rule says, and its evidence."""


def findings(recording: Recording) -> list[Finding]:
    """Everything that the rules see, in the order of the table."""
    return [
        Finding(name, trace.host, says, evidence, advice)
        for name, (look, advice) in RULES.items()
        for trace in recording.hosts.values()
        for says, evidence in look(trace, recording)
    ]


def narrow_link(trace: HostTrace, recording: Recording) -> Seen:
    """Width does not fall when a card idles, so more than a stray sample counts."""
    for card in trace.cards:
        widest = trace.card_facts(card).get("pcie_width_max")
        _, widths = trace.get("pcie.width", card)
        if widest and len(widths) and (width := float(np.percentile(widths, 5, method="lower"))) < widest:
            _, generations = trace.get("pcie.generation", card)
            most = link_bytes(generations.max(), width) if len(generations) else None
            limit = f", at most {most / 1e9:.1f} GB/s" if most else ""
            yield (
                f"PCIe link of card {card} runs at x{width:.0f} of x{widest}",
                f"x{width:.0f} in {share(widths == width):.0f}% of {len(widths)} samples{limit}",
            )


def slow_link(trace: HostTrace, recording: Recording) -> Seen:
    """The generation falls when a card idles: only samples of a busy card count."""
    for card in trace.cards:
        fastest = trace.card_facts(card).get("pcie_generation_max")
        times, generations = trace.get("pcie.generation", card)
        load = trace.get("gpu.busy", card)
        at_work = generations[np.interp(times, load[0], load[1]) > 50] if len(load[0]) else generations[:0]
        if fastest and len(at_work) >= 3 and at_work.max() < fastest:
            yield (
                f"PCIe link of card {card} stays at generation {at_work.max():.0f} of {fastest} under load",
                f"{len(at_work)} samples with the card over 50% busy",
            )


def waits_for_cores(trace: HostTrace, recording: Recording) -> Seen:
    """A data loader or tokenizer that cannot keep up."""
    for card in trace.cards:
        shares = card_shares(trace, card, *trace.span)
        if (shares["waits_for_cores"] or 0) >= 20:
            yield (
                f"GPU {card} idle {shares['waits_for_cores']:.0f}% of the time while the data loader's cores are full",
                f"idle {shares['idle']:.0f}% in all; in so much of it a core was at least 90% busy"
                + _hungriest(trace, recording),
            )


def waits_for_disk(trace: HostTrace, recording: Recording) -> Seen:
    """Samples where the card idles and the cores wait for a disk."""
    for card in trace.cards:
        shares = card_shares(trace, card, *trace.span)
        if (shares["waits_for_disk"] or 0) >= 20:
            yield (
                f"GPU {card} idle {shares['waits_for_disk']:.0f}% of the time while the disk is read",
                f"idle {shares['idle']:.0f}% in all; in so much of it cores waited for a disk",
            )


def held_and_idle(trace: HostTrace, recording: Recording) -> Seen:
    """Nothing of the host is full, and the card, with a process on it, does nothing."""
    for card in trace.cards:
        shares = card_shares(trace, card, *trace.span)
        holders = [device for device in trace.devices("gpu.process_memory") if device.startswith(f"{card}/")]
        if holders and (shares["waits_for_else"] or 0) >= 40:
            names = ", ".join(recording.process_name(trace.host, device.partition("/")[2]) for device in holders)
            yield (
                f"GPU {card} idle {shares['waits_for_else']:.0f}% of the time while a job holds it",
                f"idle {shares['idle']:.0f}% in all; in so much of it no core or disk was full; held by {names}",
            )


def power_cap(trace: HostTrace, recording: Recording) -> Seen:
    """NVML's own word for it."""
    for card in trace.cards:
        capped = card_shares(trace, card, *trace.span)["power_capped"] or 0
        if capped >= 10:
            limit = trace.card_facts(card).get("power_limit")
            yield (
                f"GPU {card}: power cap reached {capped:.0f}% of the time",
                f"clocks were held by power; the limit is {limit:.0f} W" if limit else "clocks were held by power",
            )


def too_hot(trace: HostTrace, recording: Recording) -> Seen:
    """NVML's own word for it."""
    for card in trace.cards:
        hot = card_shares(trace, card, *trace.span)["too_hot"] or 0
        if hot >= 1:
            _, degrees = trace.get("gpu.temperature", card)
            top = f"; at most {degrees.max():.0f} degrees Celsius" if len(degrees) else ""
            yield f"GPU {card} throttled by heat {hot:.0f}% of the time", f"thermal slowdown told by NVML{top}"


def slowed_down(trace: HostTrace, recording: Recording) -> Seen:
    """A hardware slowdown without heat is the power supply's."""
    for card in trace.cards:
        shares = card_shares(trace, card, *trace.span)
        if (shares["slowed_down"] or 0) >= 1 and not shares["too_hot"]:
            yield (
                f"GPU {card} slowed down by its hardware {shares['slowed_down']:.0f}% of the time",
                "NVML tells a hardware slowdown, and no heat",
            )


def link_full(trace: HostTrace, recording: Recording) -> Seen:
    """Traffic beside what the link that the card really has could carry."""
    for card in trace.cards:
        _, generations = trace.get("pcie.generation", card)
        _, widths = trace.get("pcie.width", card)
        if not len(generations) or not len(widths):
            continue
        limit = link_bytes(generations.max(), float(np.median(widths)))
        if not limit:
            continue
        for metric, words in (("pcie.received", "to"), ("pcie.sent", "from")):
            full = share(trace.get(metric, card)[1] > 0.75 * limit)
            if full is not None and full >= 10:
                yield (
                    f"PCIe traffic {words} card {card} fills its link {full:.0f}% of the time",
                    f"over 75% of {limit / 1e9:.1f} GB/s, in windows of 20 ms",
                )


def card_memory_full(trace: HostTrace, recording: Recording) -> Seen:
    """Close to running out."""
    for card in trace.cards:
        total = trace.card_facts(card).get("memory_bytes")
        _, used = trace.get("gpu.memory_used", card)
        if total and len(used) and used.max() > 0.97 * total:
            yield (
                f"GPU {card}: memory nearly full",
                f"{used.max() / GIB:.1f} of {total / GIB:.1f} GiB at the peak",
            )


def uneven_cards(trace: HostTrace, recording: Recording) -> Seen:
    """Cards of one job wait for the slowest of them."""
    means = {card: share_busy for card in trace.cards if (share_busy := _mean(trace, "gpu.busy", card)) is not None}
    working = {card: mean for card, mean in means.items() if mean >= IDLE_PERCENT}
    if len(working) > 1 and max(working.values()) - min(working.values()) > 30:
        least, most = min(working, key=working.__getitem__), max(working, key=working.__getitem__)
        yield (
            f"GPU {least} works less than GPU {most}",
            f"{working[least]:.0f}% busy beside {working[most]:.0f}%",
        )


def memory_full(trace: HostTrace, recording: Recording) -> Seen:
    """The host's memory."""
    total = trace.facts.get("memory_bytes")
    _, used = trace.get("memory.used")
    if total and len(used) and used.max() > 0.95 * total:
        yield "the host's memory is nearly full", f"{used.max() / GIB:.1f} of {total / GIB:.1f} GiB at the peak"
    _, swap = trace.get("swap.used")
    if len(swap) and swap.max() - swap[0] > 0.25 * GIB:
        yield "the host began to swap", f"{(swap.max() - swap[0]) / GIB:.1f} GiB more than at the start"


def spilled(trace: HostTrace, recording: Recording) -> Seen:
    """Ray writes objects to disk when its store is full."""
    bytes_ = trace.total("object_store.spilled_bytes", *trace.span)
    if bytes_:
        yield "Ray's object store spilled to disk", f"{bytes_ / GIB:.2f} GiB"


def cores_full(trace: HostTrace, recording: Recording) -> Seen:
    """All of them, on a host that does its work without a card."""
    _, busy = trace.get("cpu.busy")
    full = share(busy > 90)
    if full is not None and full >= 60 and not trace.cards:
        yield f"all cores full {full:.0f}% of the time", "over 90% busy" + _hungriest(trace, recording)


def sensor_failed(trace: HostTrace, recording: Recording) -> Seen:
    """It answered at the start: what is drawn of it has a gap."""
    for sensor, reason in trace.facts.get("missing", {}).items():
        if "in the middle" in reason:
            yield f"{sensor} failed in the middle of the recording", reason


def damaged_part(trace: HostTrace, recording: Recording) -> Seen:
    """What was sampled meanwhile is lost; the others are read."""
    if damaged := trace.facts.get("damaged_parts"):
        yield f"{len(damaged)} of the host's files of samples cannot be read", "; ".join(damaged[:3])


def clock_set(trace: HostTrace, recording: Recording) -> Seen:
    """The axis does not follow a clock that is set, but logs do."""
    for step in trace.facts.get("clock_steps", []):
        yield (
            f"the clock was set by {step['seconds']:+.1f} s",
            f"{step['time'] - recording.span[0]:.0f} s after the start; the time axis is not bent by it",
        )


def clock_apart(trace: HostTrace, recording: Recording) -> Seen:
    """Hosts' logs cannot be laid beside each other."""
    offset = recording.offsets.get(trace.host, 0.0)
    if abs(offset) > max(0.5, 3 * recording.clock_error):
        yield (
            f"the clock differs by {offset:+.1f} s from the other hosts'",
            f"measured, to {recording.clock_error * 1000:.0f} ms; the time axis is corrected",
        )


def host_ended(trace: HostTrace, recording: Recording) -> Seen:
    """Its samples end before the others' do, by more than a part."""
    before = recording.span[1] - trace.span[1]
    if before > 2 * PART_SECONDS:
        yield (
            "the host's samples end before the recording does",
            f"{before:.0f} s before the last sample of another host: it died, or lost the storage",
        )


def host_stood_still(trace: HostTrace, recording: Recording) -> Seen:
    """Between two samples lie many periods: the host was suspended, or so loaded that the sampler was not run."""
    times, _ = trace.get("cpu.busy")
    gaps = np.diff(times)
    if len(gaps) and gaps.max() > max(3.0, 5 / trace.facts.get("hertz", 1.0)):
        yield (
            f"no sample for {gaps.max():.0f} s",
            f"{times[gaps.argmax()] - recording.span[0]:.0f} s after the start: suspended, overloaded or killed",
        )


def sampler_cost(trace: HostTrace, recording: Recording) -> Seen:
    """A recording must not be what it finds."""
    wall = trace.facts.get("sampler_wall_seconds")
    if wall and (cost := 100 * trace.facts["sampler_cpu_seconds"] / wall) > 2 and wall > 10:
        yield f"sampling took {cost:.1f}% of a core", f"at {trace.facts['hertz']:g} Hz"


def _mean(trace: HostTrace, metric: str, device: str) -> float | None:
    _, values = trace.get(metric, device)
    return float(values.mean()) if len(values) else None


def _hungriest(trace: HostTrace, recording: Recording) -> str:
    """The process that took most of the cores, where processes were sampled."""
    means = {device: _mean(trace, "process.cpu", device) or 0.0 for device in trace.devices("process.cpu")}
    if not means:
        return ""
    most = max(means, key=means.__getitem__)
    return f"; most by {recording.process_name(trace.host, most)}, {means[most]:.0f}% of a core"


Look = Callable[[HostTrace, Recording], Seen]

RULES: dict[str, tuple[Look, str]] = {
    "narrow link": (narrow_link, "Reseat the card, look for a shared slot or a riser, and see the board's manual."),
    "slow link": (slow_link, "Set the slot's generation in the firmware; a riser may force it down."),
    "link full": (link_full, "Keep the data on the card, copy pinned memory ahead of its use, or send less."),
    "waits for cores": (waits_for_cores, "Tokenize beforehand, or give the loader more workers and cores."),
    "waits for disk": (waits_for_disk, "Move the data to a faster disk, or into memory."),
    "held and idle": (held_and_idle, "Free the card, or find by 'profile flame' what its process waits for."),
    "power cap": (power_cap, "A higher limit by 'nvidia-smi -pl', if supply and cooling allow it."),
    "too hot": (too_hot, "Look after airflow and fans; a lower power limit may be faster than throttling."),
    "slowed down": (slowed_down, "Look at the power supply and its cables to the card."),
    "card memory full": (card_memory_full, "A smaller batch or context, or recomputation, before it runs out."),
    "uneven cards": (uneven_cards, "Give each card work by its speed, or the job alike cards."),
    "memory full": (memory_full, "Fewer workers or a smaller object store on this host."),
    "spilled": (spilled, "A larger object store, or smaller blocks of the dataset in flight."),
    "cores full": (cores_full, "More hosts, or fewer threads fighting for these cores."),
    "sensor failed": (sensor_failed, "See the kernel's log for Xid errors: a card may have fallen off its bus."),
    "damaged part": (damaged_part, "Look after the storage: a part is written whole or not at all."),
    "clock set": (clock_set, "Let one NTP daemon slew the clock, and no other program set it."),
    "clock apart": (clock_apart, "Run an NTP daemon on every host."),
    "host ended": (host_ended, "See 'cluster doctor' and the host's own log."),
    "host stood still": (host_stood_still, "See the kernel's log, and the memory of that time."),
    "sampler cost": (sampler_cost, "Record with fewer hertz."),
}  # fmt: skip
