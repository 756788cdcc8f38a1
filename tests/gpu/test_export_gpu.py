"""An exported adapter in vLLM on a CUDA card, against Transformers with PEFT on the CPU. Skipped without."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)


def test_the_adapter_gives_every_token_the_trained_probability(
    tmp_path: Path, runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import make_tiny_llama
    from peft import PeftModel
    from trained_runs import exported, make_run
    from transformers import AutoModelForCausalLM
    from vllm_logprobs import ask_vllm

    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = make_run(make_tiny_llama(tmp_path / "base", hidden=256), tmp_path)  # heads of 64, as vLLM wants on a card
    adapter, undone, merged = (
        str(exported(run, f"format={form}", *keys)[0])
        for form, keys in (("adapter", []), ("base", ["dtype=float32"]), ("safetensors", ["dtype=float32"]))
    )
    ids = torch.randint(5, 1000, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(undone), adapter).eval()
    with torch.no_grad():
        logits_TV = whole(torch.tensor([ids])).logits[0, :-1]
    wanted = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for answer in ask_vllm([(undone, adapter), (merged, None)], ids, rank=8):
        assert (torch.tensor(answer) - wanted).abs().max() < 1e-3  # an assumption: nobody has seen it run
