"""What vLLM's engine holds of a model, in a process of its own: ``ask_memory``."""

import json
import os
import subprocess
import sys
from typing import Any

from vllm_logprobs import MARK

from workbench.config import CHECKOUT

PLANNED = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
"""A config of 0.3 GiB in 16 bits, to which vLLM casts it."""


def ask_memory(model: str, **engine: Any) -> dict[str, int]:
    """Bytes of the ``weights``, tokens that the cache has room for (``cache_tokens``), and bytes that torch has
    ``allocated`` on the card (0 without one). The weights are made up, and no tokenizer is needed."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps({"model": model, **engine})],
        capture_output=True, text=True, cwd=CHECKOUT,
        env={
            **os.environ, "PYTHONPATH": str(CHECKOUT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return dict(json.loads(line.removeprefix(MARK)))


def weights_of(model: Any) -> int:
    """Bytes of a module's parameters, each once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def held(engine: dict[str, Any]) -> dict[str, int]:
    """The same, in this process."""
    import torch
    from vllm import LLM

    llm = LLM(load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, **engine)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "weights": llm.apply_model(weights_of)[0],
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "allocated": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
    }


if __name__ == "__main__":
    print(MARK + json.dumps(held(json.loads(sys.argv[1]))), flush=True)
