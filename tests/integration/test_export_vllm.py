"""What QLoRA trained, in vLLM on the CPU: every token is as likely as in Transformers with PEFT."""

from pathlib import Path

import pytest
import torch
from models import make_tiny_llama
from trained_runs import exported, make_run
from vllm_logprobs import ask_vllm

from serve import availability
from workloads.training.adapters import load_base

pytestmark = pytest.mark.skipif(availability.available() is not None, reason=str(availability.available()))

TOLERANCE = 1e-5
"""Nats, in float32: vLLM sums in another order than Transformers; 1.4e-6 was seen."""


def by_transformers(base: Path, adapter: str, ids: list[int]) -> torch.Tensor:
    """By Transformers and PEFT, on the base in NF4."""
    from peft import PeftModel

    whole = load_base(str(base), "float32", "nf4", torch.device("cpu"))
    with torch.no_grad():
        logits_TV = PeftModel.from_pretrained(whole, adapter).eval()(torch.tensor([ids])).logits[0, :-1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_the_adapter_and_the_merged_model_give_every_token_the_trained_probability(
    tmp_path: Path, runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    base = make_tiny_llama(tmp_path / "base")
    run = make_run(base, tmp_path)
    adapter, undone, merged = (
        str(exported(run, f"format={form}", *keys)[0])
        for form, keys in (("adapter", []), ("base", ["dtype=float32"]), ("safetensors", ["dtype=float32"]))
    )
    ids = torch.randint(5, 1000, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    answers = ask_vllm([(undone, adapter), (merged, None), (undone, None)], ids, rank=8)
    with_adapter, as_merged, without = map(torch.tensor, answers)
    wanted = by_transformers(base, adapter, ids)
    assert (with_adapter - wanted).abs().max() < TOLERANCE
    assert (as_merged - wanted).abs().max() < TOLERANCE
    assert (without - wanted).abs().max() > 0.1, "the adapter does nothing"
