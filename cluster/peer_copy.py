"""Whether a copy from each card to each other one arrives intact: ``ENV/bin/python - REQUEST < cluster/peer_copy.py``.

It runs in a host's environment, needs torch alone and prints one JSON list. A half-working peer-to-peer path, common
with an IOMMU or ACS on a desktop board, copies wrong bytes or never returns, and NCCL then hangs: so every pair is
copied several times, compared on the host, and has a time limit.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

PAIR_SECONDS = 20


def copies(devices: list[str], mib: int, repeats: int) -> list[dict[str, Any]]:
    """One entry an ordered pair: ``peer`` (the driver offers a direct path), ``intact``, ``reason`` where it is not."""
    import torch

    found: list[dict[str, Any]] = []
    for source in devices or [f"cuda:{index}" for index in range(torch.cuda.device_count())]:
        for target in devices or [f"cuda:{index}" for index in range(torch.cuda.device_count())]:
            if source == target:
                continue
            entry: dict[str, Any] = {"source": source, "target": target, "peer": None, "intact": None, "reason": ""}
            limit = threading.Timer(PAIR_SECONDS, give_up, args=([*found, entry],))
            limit.daemon = True
            limit.start()
            try:
                if source.startswith("cuda"):
                    entry["peer"] = torch.cuda.can_device_access_peer(torch.device(source), torch.device(target))
                wrong = wrong_bytes(torch, source, target, mib << 20, repeats)
                entry["intact"], entry["reason"] = not wrong, f"{wrong} bytes arrive wrong" if wrong else ""
            except RuntimeError as error:  # out of memory among them: not tried is not broken
                entry["reason"] = str(error).splitlines()[0]
            limit.cancel()
            found.append(entry)
    return found


def give_up(found: list[dict[str, Any]]) -> None:
    """Tell that the last copy hangs, and end: nothing else ends a call that waits in the driver."""
    found[-1].update(intact=False, reason=f"does not return within {PAIR_SECONDS} s")
    print(json.dumps(found), flush=True)
    os._exit(0)


def wrong_bytes(torch: Any, source: str, target: str, size: int, repeats: int) -> int:
    """How many of ``size`` random bytes differ after the copy, over all repeats."""
    wrong = 0
    generator = torch.Generator().manual_seed(17)
    for _ in range(repeats):
        sent = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        arrived = sent.to(source).to(target, copy=True).cpu()
        wrong += int((arrived != sent).sum())
    return wrong


def main(asked: dict[str, Any]) -> None:
    """Print what became of every copy."""
    print(json.dumps(copies(asked.get("devices", []), asked.get("mib", 32), asked.get("repeats", 4))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
