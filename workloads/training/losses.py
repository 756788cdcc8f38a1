"""The loss of rows, as the sum over their target tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.training.batches import IGNORE, Row, collate


def summed_loss(model: nn.Module, rows: Sequence[Row], device: torch.device) -> Tensor:
    """Cross-entropy in nats, summed over the target tokens of ``rows``; a scalar in float32."""
    batch = collate(rows, device)
    ids_BT, labels_BT = batch.ids_BT, batch.labels_BT
    # Logits are made only from the first position that predicts a target: instructions are long, answers short.
    first = int((labels_BT[:, 1:] != IGNORE).any(0).int().argmax())
    kept = torch.arange(first, ids_BT.shape[1] - 1, device=device)
    logits_BKV = model(**batch.inputs, use_cache=False, logits_to_keep=kept).logits
    return F.cross_entropy(
        logits_BKV.flatten(0, 1).float(), labels_BT[:, first + 1 :].flatten(), ignore_index=IGNORE, reduction="sum"
    )
