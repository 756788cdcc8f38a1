"""A base loaded piece by piece onto a card: the bytes of one that is loaded whole. Skipped where there is none."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)


@pytest.mark.parametrize("kernel", ["triton", "bitsandbytes"])
def test_every_byte_on_the_card_is_that_of_a_base_that_is_loaded_whole(kernel: str, tmp_path: Path) -> None:
    from loss_equality import make_base

    from workloads.training.adapters import load_base
    from workloads.training.pieces import Pieces

    make_base(tmp_path, hidden=256)
    card = torch.device("cuda", 0)
    pieces = Pieces.of(str(tmp_path), "bfloat16", "nf4", card, kernel)
    assert pieces is not None
    pieces.fill(pieces.model)
    whole = load_base(str(tmp_path), "bfloat16", "nf4", card, kernel=kernel)
    for (name, mine), theirs in zip(pieces.model.named_parameters(), whole.parameters(), strict=True):
        assert mine.device == card, name
        assert torch.equal(mine, theirs), name
    ids_BT = torch.arange(20, device=card)[None]
    assert torch.equal(pieces.model.to(card)(ids_BT).logits, whole(ids_BT).logits)
