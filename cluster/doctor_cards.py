"""NVIDIA's driver and cards against the inventory: pure functions of it and what was seen."""

from collections.abc import Iterator

from cluster.cards import card_model
from cluster.doctor_row import GIB, Row
from cluster.examination import Copy, Seen
from cluster.facts import CardFacts, Facts
from cluster.inventory import Card, Host, Inventory

MEMORY_TOLERANCE = 0.1
"""A card keeps some of its memory to itself: 32 GB on the box are 31.8 GiB by NVML."""
UP = "workbench cluster up"


def check_driver(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Driver and CUDA; the driver must be as new as the CUDA that the environment's torch was built for."""
    for name, host, facts in _with_cards(inventory, seen):
        if facts.nvidia is None:
            yield Row(name, "driver", "failed", facts.missing.get("NVIDIA driver", "no driver"), "NVIDIA's driver",
                      "on Ubuntu: sudo ubuntu-drivers install; on Debian: sudo apt-get install nvidia-driver; "
                      "then restart it and look: nvidia-smi")  # fmt: skip
            continue
        about = f"{facts.nvidia.driver or 'unknown'}, CUDA {facts.nvidia.cuda or 'unknown'}"
        built = facts.environment.torch_cuda if facts.environment else None
        packages = facts.environment.packages if facts.environment else {}
        if host.cards and "torch" in packages and built is None:
            yield Row(name, "driver", "warning", f"{about}; torch {packages['torch']} cannot use it", "torch with CUDA",
                      f"{UP}, or in its own environment: pip install torch with CUDA")  # fmt: skip
        elif built and facts.nvidia.cuda and _major(built) > _major(facts.nvidia.cuda):
            yield Row(name, "driver", "failed", about, f"CUDA {built}, for which its torch is built",
                      "install a newer driver, restart, and look: nvidia-smi")  # fmt: skip
        else:
            yield Row(name, "driver", "ok", about + (f"; torch for CUDA {built}" if built else ""))


def check_cards(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Model, memory and UUID of each card against the inventory, in NVML's order."""
    for name, host, facts in _with_cards(inventory, seen):
        if facts.nvidia is None:
            continue
        again = f"workbench cluster init --discover {_target(host)} seen.yaml    (and compare)"
        for index, (card, found) in enumerate(_paired(host.cards, facts.nvidia.cards)):
            key, check = f"hosts.{name}.cards.{index}", f"card {index}"
            if found is None and card is not None:
                yield Row(name, check, "failed", "no such card", _described(card),
                          f"nvidia-smi -L    (powered? seated?), or take {key} out of the inventory")  # fmt: skip
            elif card is None and found is not None:
                yield Row(name, check, "warning", f"{found.name}, {found.uuid}", "no card in the inventory", again)
            elif card is not None and found is not None:
                yield _compared(name, check, key, card, found, again)


def check_links(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """PCIe: lanes now, and the generation that card and slot can make together, against the inventory's."""
    for name, host, facts in _with_cards(inventory, seen):
        if facts.nvidia is None:
            continue
        for index, (card, found) in enumerate(_paired(host.cards, facts.nvidia.cards)):
            if card is not None and found is not None:
                yield _link(name, f"PCIe of card {index}", f"hosts.{name}.cards.{index}.pcie", card, found, facts)


def check_peers(inventory: Inventory, seen: Seen) -> Iterator[Row]:
    """Whether a copy from card to card arrives. A path that half works hangs NCCL for ever."""
    for name, host, facts in _with_cards(inventory, seen):
        if facts.nvidia is None or len(facts.nvidia.cards) < 2:
            continue
        copies = seen.copies.get(name, [])
        direct = sum((facts.nvidia.peers or {}).values())
        offered = f"driver offers {direct} of {len(facts.nvidia.peers)} direct paths" if facts.nvidia.peers else ""
        wrong = [copy for copy in copies if copy.intact is False or _hung(copy)]
        untried = [copy for copy in copies if copy.intact is None and not _hung(copy)]
        remedy = f"in the inventory: hosts.{name}.nccl_p2p: false, then: {UP}    (sets NCCL_P2P_DISABLE=1)"
        if wrong and not host.nccl_p2p:
            yield Row(name, "peer to peer", "ok", f"{_told(wrong)}; NCCL does without (NCCL_P2P_DISABLE=1)")
        elif wrong:
            yield Row(name, "peer to peer", "failed", _told(wrong), "every copy intact", remedy)
        elif untried or not copies:
            why = _told(untried) if untried else "no environment whose torch has CUDA"
            yield Row(name, "peer to peer", "warning", "; ".join(filter(None, [f"not tried: {why}", offered])),
                      "every copy intact", f"{UP}; end what holds the cards; workbench cluster doctor")  # fmt: skip
        else:
            how = "directly" if all(copy.peer for copy in copies) else "through the host's memory"
            yield Row(name, "peer to peer", "ok", f"{len(copies)} copies intact, {how}")


CHECKS = [check_driver, check_cards, check_links, check_peers]


def _with_cards(inventory: Inventory, seen: Seen) -> Iterator[tuple[str, Host, Facts]]:
    for name, host in inventory.hosts.items():
        facts = seen.facts.get(name)
        if facts is not None and (host.cards or facts.nvidia is not None):
            yield name, host, facts


def _paired(cards: list[Card], found: list[CardFacts]) -> list[tuple[Card | None, CardFacts | None]]:
    """Each card of the inventory with the one of its UUID, else with the one in its place that no other claims."""
    by_uuid = {one.uuid: one for one in found}
    claimed = {card.uuid for card in cards if card.uuid in by_uuid}
    rest = {one.index: one for one in found if one.uuid not in claimed}
    pairs: list[tuple[Card | None, CardFacts | None]] = []
    for index, card in enumerate(cards):
        place = index if index in rest else min(rest, default=None)
        pairs.append(
            (card, by_uuid[card.uuid] if card.uuid in claimed else rest.pop(place) if place is not None else None)
        )
    return pairs + [(None, one) for one in rest.values()]


def _compared(name: str, check: str, key: str, card: Card, found: CardFacts, again: str) -> Row:
    model = card_model(found.name)
    memory = None if found.memory_bytes is None else found.memory_bytes / GIB
    about = f"{model}, {f'{memory:.0f} GiB' if memory else 'memory unknown'}, {found.uuid}"
    if found.processes:
        about += f", held by {found.processes} processes"
    if model != card.model:
        return Row(
            name, check, "failed", about, _described(card), f"in the inventory: {key}.model: {model}, or: {again}"
        )
    if memory is not None and abs(memory - card.memory_gb) > MEMORY_TOLERANCE * card.memory_gb:
        remedy = f"in the inventory: {key}.memory_gb: {memory:.0f}"
        return Row(name, check, "failed", about, _described(card), remedy)
    if card.uuid and card.uuid != found.uuid:
        return Row(name, check, "failed", about, card.uuid, f"in the inventory: {key}.uuid: {found.uuid}")
    if not card.uuid:
        remedy = f"in the inventory: {key}.uuid: {found.uuid}"
        return Row(name, check, "warning", about, "a UUID, without which nothing is pinned to it", remedy)
    return Row(name, check, "ok", about)


def _link(name: str, check: str, key: str, card: Card, found: CardFacts, facts: Facts) -> Row:
    lacking = [
        reason for what, reason in facts.missing.items() if "PCIe" in what and what.endswith(f"card {found.index}")
    ]
    expected = f"{card.pcie.generation}.0 x{card.pcie.width}"
    if found.width is None or found.generation_max is None:
        return Row(name, check, "warning", f"not told by the driver: {'; '.join(lacking) or 'unknown'}", expected,
                   "look yourself: sudo lspci -vv | grep -E 'VGA|LnkCap:|LnkSta:'")  # fmt: skip
    now = "" if found.generation is None else f", {found.generation}.0 now (it falls when idle)"
    about = f"{found.generation_max}.0 x{found.width}{'' if found.generation == found.generation_max else now}"
    if found.width_max is not None:
        about += f", card and board can x{found.width_max}"
    if found.width < card.pcie.width:
        return Row(name, check, "failed", about, expected,
                   "switch off, seat it anew in the slot with the most lanes (risers and M.2 drives take some); "
                   f"if that is all it has, in the inventory: {key}.width: {found.width}")  # fmt: skip
    if found.generation_max < card.pcie.generation:
        return Row(name, check, "failed", about, expected,
                   "in the BIOS set the slot to Auto or its highest generation, and take out a riser of an older one; "
                   f"if that is all it has, in the inventory: {key}.generation: {found.generation_max}")  # fmt: skip
    return Row(name, check, "ok", about)


def _described(card: Card) -> str:
    return f"{card.model}, {card.memory_gb:g} GB" + (f", {card.uuid}" if card.uuid else "")


def _hung(copy: Copy) -> bool:
    return copy.intact is None and ("did not answer" in copy.reason)


def _told(copies: list[Copy]) -> str:
    return "; ".join(
        f"{copy.source} to {copy.target}: {copy.reason}" if copy.source else copy.reason for copy in copies
    )


def _target(host: Host) -> str:
    return f"{host.user}@{host.address}" + ("" if host.ssh_port == 22 else f":{host.ssh_port}")


def _major(version: str) -> int:
    return int(version.split(".")[0])
