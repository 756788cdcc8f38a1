"""A plugin of vLLM 0.32 for tests: its CPU kernel of experts takes local expert numbers, and is given global ones.

Under expert parallelism each rank holds some of the experts, and its kernel reads past the end of them. Here a token's
experts that are elsewhere get weight 0 and a number that exists; the sum over the ranks is then the whole.
"""

from pathlib import Path
from typing import Any


def register() -> None:
    """Wrap ``CPUUnquantizedExperts.apply``. vLLM calls this in every process, maybe more than once."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    whole: Any = CPUUnquantizedExperts.apply
    if getattr(whole, "maps_experts", False):
        return

    def apply(self: Any, **given: Any) -> None:
        if (expert_map := given["expert_map"]) is not None:
            local = expert_map[given["topk_ids"].long()]
            here = local >= 0
            given["topk_ids"] = torch.where(here, local, 0).to(given["topk_ids"].dtype)
            given["topk_weights"] = torch.where(here, given["topk_weights"], 0.0)
        whole(self, **given)

    apply.maps_experts = True  # type: ignore[attr-defined]
    CPUUnquantizedExperts.apply = apply  # type: ignore[method-assign]


def install(folder: Path) -> dict[str, str]:
    """Write the plugin's entry point to ``folder``; returns the environment in which vLLM finds it."""
    described = folder / "cpu_expert_map-0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-expert-map\nVersion: 0\n")
    (described / "entry_points.txt").write_text("[vllm.general_plugins]\ncpu_expert_map = cpu_expert_map:register\n")
    here, checkout = Path(__file__).parent, Path(__file__).parents[1]
    return {"PYTHONPATH": f"{checkout}:{here}:{folder}"}
