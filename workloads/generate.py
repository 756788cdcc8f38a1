"""Greedy answers of a model, in batches of alike length, with a key-value cache."""

import re
from pathlib import Path
from typing import Any

from workloads.instructions import Instruction, prompt

THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
"""What templates of reasoning models, such as Qwen3's, put before an answer, thought or not; it is no part of it."""


def load_for_answers(source: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer at ``source``: a model folder, an adapter folder (its base is read from it), or a hub name.

    Prompts are padded on the left, so that all of a batch's answers begin at the same position.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if (Path(source) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(source, dtype=dtype).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def greedy_answers(
    source: str, rows: list[Instruction], *, device: str, batch_size: int, max_new_tokens: int, template: str = ""
) -> list[str]:
    """The answer of the model at ``source`` to each row, in the order of ``rows``; text up to the end token.

    ``template`` is the chat template to ask with where the model has none.
    """
    import torch

    model, tokenizer = load_for_answers(source, device)
    tokenizer.chat_template = tokenizer.chat_template or template
    prompts = [prompt(row, tokenizer) for row in rows]
    # A batch runs until its longest answer ends, so questions of one task go together, then those of alike length.
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["task"], len(prompts[i])))
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in chosen], padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids_BT = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        said = tokenizer.batch_decode(ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, said, strict=True):
            answers[i] = THOUGHT.sub("", text).strip()
    return answers
