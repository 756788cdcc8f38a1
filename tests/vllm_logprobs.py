"""Log-probabilities of a prompt's tokens by vLLM in float32, in a process of its own: ``ask_vllm``."""

import json
import os
import subprocess
import sys
from typing import Any

from workbench.config import CHECKOUT

MARK = "RESULT "


def ask_vllm(
    models: list[tuple[str, str | None]], ids: list[int], rank: int,
    engine: dict[str, Any] | None = None, environment: dict[str, str] | None = None,
) -> list[list[float]]:  # fmt: skip
    """For each model, with or without an adapter of at most ``rank``: the log-probability of every token of ``ids``
    but the first, given those before it. ``engine`` has further arguments of the engine, ``environment`` variables."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps({"models": models, "ids": ids, "rank": rank, "engine": engine or {}})],
        capture_output=True, text=True, cwd=CHECKOUT,
        env={
            **os.environ, "PYTHONPATH": str(CHECKOUT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **(environment or {}),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return [json.loads(line) for line in lines]


def ask_transformers(model: str, ids: list[int]) -> list[float]:
    """The same by Transformers in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = whole(torch.tensor([ids])).logits[0, :-1]
    found: list[float] = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


def prompt_logprobs(
    model: str, adapter: str | None, ids: list[int], rank: int, engine_arguments: dict[str, Any]
) -> list[float]:
    """Teacher-forced: each token's log-probability, whatever the model would have said. The engine ends with the call:
    a second one in its process would lose its groups with the first."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank} if adapter else {}
    arguments: dict[str, Any] = {
        "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 2,
        "max_model_len": 256, **lora, **engine_arguments,
    }  # fmt: skip
    engine = LLM(model, **arguments)
    [answer] = engine.generate(
        TokensPrompt(prompt_token_ids=ids),
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
        use_tqdm=False,
    )
    return [place[token].logprob for place, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    for model, adapter in asked["models"]:
        found = prompt_logprobs(model, adapter, asked["ids"], asked["rank"], asked["engine"])
        print(MARK + json.dumps(found), flush=True)
