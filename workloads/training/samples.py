"""What the model answers while it learns: greedy continuations of a few prompts, on any number of ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workbench.row_file import RowFile, read_rows
from workloads.training.fsdp import computes_on, evaluation_mode


class Sampler:
    """Writes the answers to ``prompts`` into ``file`` every ``every`` steps; 0: never. ``truths`` stand beside them.
    ``positions`` is how many the model has learned, None where it computes them."""

    def __init__(
        self, tokenizer: Any, prompts: Sequence[str], truths: Sequence[str], file: Path, every: int, tokens: int,
        positions: int | None = None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._prompts, self._truths = tokenizer, prompts, truths
        self._rows, self._every, self._tokens, self._positions = RowFile(file), every, tokens, positions

    def due(self, step: int) -> bool:
        """Whether ``step`` is one of those to sample after."""
        return bool(self._every) and step % self._every == 0

    def __call__(self, step: int, model: Any) -> None:
        """Sample from ``model``. Collective: every rank calls it, rank 0 writes."""
        answers = greedy(model, self._tokenizer, self._prompts, self._tokens, self._positions)
        if dist.is_initialized() and dist.get_rank():
            return
        asked = zip(self._prompts, answers, self._truths, strict=True)
        rows = [{"step": step, "prompt": prompt, "answer": said, "truth": truth} for prompt, said, truth in asked]
        self._rows.add(*rows)


def read_samples(file: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The rows of ``file`` up to step ``until``, none where there is no file; half a line is left out."""
    return [row for row in read_rows(file) if until is None or row["step"] <= until]


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, positions: int | None = None) -> list[str]:
    """The most likely continuation of each prompt, up to ``tokens`` tokens or the end token.

    Within ``positions``, where there is a table of so many, a prompt loses its beginning; an answer takes no more than
    half of them.

    The model is called whole, as FSDP needs it: ``generate`` of an adapter goes past the root of a sharded model. Every
    rank computes the same, so that shards can be gathered; rank 0's choice of a token counts.
    """
    device, end = computes_on(model), tokenizer.eos_token_id
    asked = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    if positions is not None:
        tokens = min(tokens, positions // 2)
        asked = [ids[tokens - positions :] for ids in asked]
    length = max(map(len, asked))
    ids_BT = torch.tensor([[end] * (length - len(ids)) + ids for ids in asked], device=device)
    mask_BT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in asked], device=device)
    said: list[list[int]] = [[] for _ in prompts]
    past: Any = None
    with evaluation_mode(model):
        for _ in range(tokens):
            positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            out = model(
                input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=past,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            past, chosen_B = out.past_key_values, out.logits[:, -1].argmax(-1)
            if dist.is_initialized():
                dist.broadcast(chosen_B, 0)
            for answer, token in zip(said, chosen_B.tolist(), strict=True):
                answer += [token] if end not in answer else []
            if all(end in answer for answer in said):
                break
            ids_BT = chosen_B[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in said]
