"""Sampled answers of a model that has learned its positions stay within them."""

from pathlib import Path

import pytest
from models import make_tiny_llama
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from workloads.training.samples import greedy


@pytest.mark.parametrize(("prompt", "tokens"), [("one two three " * 40, 8), ("one two three " * 2, 200)])
def test_a_prompt_and_its_answer_stay_within_a_table_of_positions(prompt: str, tokens: int, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path, hidden=32))
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, **ends)
    )
    with pytest.raises(IndexError):
        greedy(model, tokenizer, [prompt], tokens)
    assert len(greedy(model, tokenizer, [prompt], tokens, positions=64)) == 1
