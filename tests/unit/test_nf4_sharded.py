"""QLoRA on two gloo processes: the losses of one process and of bitsandbytes' own layers, half the bytes on each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import without_fused_products

from workloads.training.adapters import add_adapter, load_base, target_names, trainable_parameters
from workloads.training.config import AdapterConfig
from workloads.training.fsdp import full_state, shard, sharded_bytes

CPU = torch.device("cpu")
EXPERTS = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, str, str | list[str], int]] = {
    "llama": ("llama", "float32", "all-linear", 20),
    "llama in bfloat16": ("llama", "bfloat16", "all-linear", 3),
    "experts in 4 bits": ("mixtral", "float32", "all-linear", 5),
    "experts adapted": ("mixtral", "float32", EXPERTS, 5),
}
"""Name: base, dtype, the adapter's targets, steps."""

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def make_bases(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "llama")
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(folder / "mixtral")


def curve(model: Any, steps: int, rank: int, world: int) -> list[float]:
    """The mean loss of each step on one fixed batch, of which a rank takes every ``world``-th row."""
    ids_BT = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))[rank::world]
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().float() / world
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def adapted(folder: Path, case: str) -> Any:
    base, dtype, targets, _ = CASES[case]
    adapter = AdapterConfig(rank=4, alpha=8, targets=targets)
    model = load_base(str(folder / base), dtype, "nf4", CPU, unquantized=target_names(adapter))
    torch.manual_seed(0)
    return add_adapter(model, adapter)


def one_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen = {}
    for case, (_, dtype, _, steps) in CASES.items():
        model = adapted(folder, case)
        shard(model, getattr(torch, dtype))
        seen[case] = {"losses": curve(model, steps, rank, 2), "bytes": sharded_bytes(model)}
        if case == "llama":
            state = full_state(model)
            if rank == 0:
                torch.save(state, folder / "adapter.pt")
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What each of two ranks saw, and the folder of the bases."""
    folder = tmp_path_factory.mktemp("two")
    make_bases(folder)
    mp.spawn(one_rank, (folder,), nprocs=2)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_losses_of_one(sharded: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    folder, (seen, _) = sharded
    alone = curve(adapted(folder, case), CASES[case][3], 0, 1)
    tolerance = 1e-5 if CASES[case][1] == "float32" else 2e-2
    assert seen[case]["losses"] == pytest.approx(alone, abs=tolerance)
    assert alone[-1] < alone[0]


def test_our_layers_have_the_losses_of_bitsandbytes_own(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder, (seen, _) = sharded
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "llama", dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    torch.manual_seed(0)
    theirs = add_adapter(without_fused_products(theirs), AdapterConfig(rank=4, alpha=8))
    assert seen["llama"]["losses"] == pytest.approx(curve(theirs, 20, 0, 1), abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_half_of_the_packed_weights_and_of_their_scales(
    sharded: tuple[Path, list[dict[str, Any]]], case: str
) -> None:
    whole = sharded_bytes(adapted(sharded[0], case))
    for seen in sharded[1]:
        held = seen[case]["bytes"]
        for kind in ("", "_packed", "_scales"):
            assert whole[f"whole{kind}"] == held[f"whole{kind}"] == whole[f"local{kind}"]
            assert held[f"local{kind}"] == whole[f"whole{kind}"] / 2


def test_the_gathered_adapter_gives_an_unsharded_model_the_same_loss(
    sharded: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (seen, _) = sharded
    again = adapted(folder, "llama")
    again.load_state_dict(torch.load(folder / "adapter.pt"), strict=False)
    assert curve(again, 1, 0, 1)[0] < seen["llama"]["losses"][-1]
