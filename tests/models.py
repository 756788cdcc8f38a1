"""A tiny Llama with random weights and a tokenizer trained on the spot: real files that Transformers and vLLM load."""

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tiny_llama(folder: Path, seed: int = 0, context: int = 512, hidden: int = 128) -> Path:
    """Write a random Llama (4 layers, 4 heads) and a byte-level BPE tokenizer to ``folder``.

    ``seed`` fixes the weights, so that two models differ; ``context`` is the number of positions. Returns ``folder``.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))]
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=1024, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=context
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_tool_caller(folder: Path, context: int, calls: dict[str, str]) -> Path:
    """A tiny Llama that has learned by heart what to answer to each question of ``calls``. Returns ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_llama(folder, context=context)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = [f"<|user|>\n{asked}<|end|>\n<|assistant|>\n{answer}<|end|>" for asked, answer in calls.items()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(**batch, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_adapter(base: Path, folder: Path, rank: int = 8) -> Path:
    """A LoRA adapter of ``base`` whose weights are drawn, large enough to change what it writes. Returns ``folder``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", lora_alpha=64)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
    return folder


def make_tiny_moe(folder: Path, seed: int = 0, experts: int = 8) -> Path:
    """A random Qwen3 mixture of experts (4 layers, 2 of ``experts`` a token) with the tokenizer of the tiny Llama.
    Returns ``folder``."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    make_tiny_llama(folder, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, moe_intermediate_size=128, head_dim=32,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_experts=experts, num_experts_per_tok=2,
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each nibble of AWQ's words holds, lowest first."""


def quantise(base: Path, folder: Path, method: str, group: int = 32) -> Path:
    """``base`` with the linear layers of its blocks in 4 bits, as a checkpoint of ``method`` (``gptq`` or ``awq``), and
    in ``folder``/undone the same numbers in 32 bits. Returns ``folder``."""
    import json
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    shutil.copytree(base, folder / "undone")
    weights = load_file(base / "model.safetensors")
    packed, undone = dict(weights), {name: weight.float() for name, weight in weights.items()}
    for name, weight_NK in weights.items():
        if ".layers." not in name or weight_NK.dim() < 2:
            continue
        wide, high = weight_NK.shape
        weight_GgN = weight_NK.float().T.reshape(high // group, group, wide)
        scale_G1N = (weight_GgN.abs().amax(1, keepdim=True) / 7).half().float()
        number_KN = (weight_GgN / scale_G1N).round().clamp(-8, 7).reshape(high, wide)
        undone[name] = (number_KN.reshape(weight_GgN.shape) * scale_G1N).reshape(high, wide).T.contiguous()
        nibble_KN = (number_KN + 8).to(torch.int64)
        stem = name.removesuffix(".weight")
        if method == "gptq":
            words = sum(nibble_KN.reshape(high // 8, 8, wide)[:, i] << 4 * i for i in range(8))
            zeros = torch.full((high // group, wide // 8), 0x77777777, dtype=torch.int64)
            packed[f"{stem}.g_idx"] = torch.arange(high, dtype=torch.int32) // group
        else:
            words = sum(nibble_KN.reshape(high, wide // 8, 8)[..., c] << 4 * i for i, c in enumerate(AWQ_ORDER))
            zeros = torch.full((high // group, wide // 8), 0x88888888, dtype=torch.int64)
        del packed[name]
        packed |= {
            f"{stem}.{kind}": (value & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).contiguous()
            for kind, value in (("qweight", words), ("qzeros", zeros))
        }
        packed[f"{stem}.scales"] = scale_G1N[:, 0].half().contiguous()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(undone, folder / "undone" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    about = {"quant_method": method, "bits": 4, "group_size": group}
    own = {"desc_act": False, "sym": True} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about | own}))
    return folder


def without_fused_products(model: Any) -> Any:
    """``model``, whose bitsandbytes layers multiply in their own dtype: on a CPU with AVX512_BF16 an evaluated layer
    rounds to bfloat16 otherwise, and agrees with nothing to more than three digits."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
