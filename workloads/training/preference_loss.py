"""Direct preference optimisation: the loss of preference pairs, with the base, its adapter off, as the reference.

Rafailov et al. 2023, arXiv:2305.18290. The reward of an answer is beta times the log-ratio of its probability under the
adapted model and under the base; the loss is that of a classifier which tells by the rewards what was chosen.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.training.batches import IGNORE, Collated, Row, collate
from workloads.training.chunked_loss import log_probabilities_of
from workloads.training.config import LOSS_CHUNK, PreferenceKind
from workloads.training.fsdp import evaluation_mode
from workloads.training.objective import Sums
from workloads.training.pairs import halves


@dataclass(frozen=True)
class PreferenceLoss:
    """The mean over pairs of ``preference_losses``, plus ``sft_weight`` times the chosen answer's cross-entropy per
    token (Pang et al. 2024, arXiv:2404.19733). A row is a pair (``pairs.py``); the model has an adapter."""

    beta: float = 0.1
    kind: PreferenceKind = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    chunk: int = LOSS_CHUNK
    figures: tuple[str, ...] = field(
        default=(
            "reward/chosen", "reward/rejected", "margin", "accuracy", "log_probability/chosen",
            "log_probability/rejected",
        ),
        init=False,
    )  # fmt: skip

    def weight(self, row: Row) -> int:
        """Every pair counts alike, however long."""
        return 1

    def __call__(self, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Sums:
        """All answers, chosen and rejected, go through one forward pass of the reference and one of the policy."""
        pairs = [halves(row) for row in rows]
        batch = collate([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], device)
        with torch.no_grad(), adapter_off(model), evaluation_mode(model):
            reference_B = answer_log_probabilities(model, batch, self.chunk)
        policy_B = answer_log_probabilities(model, batch, self.chunk)

        chosen_P, rejected_P = policy_B.chunk(2)
        reward_chosen_P, reward_rejected_P = (self.beta * (policy_B - reference_B)).chunk(2)
        margin_P = reward_chosen_P - reward_rejected_P
        losses_P = preference_losses(margin_P, self.beta, self.kind, self.label_smoothing)
        if self.sft_weight:
            tokens_P = torch.tensor([chosen.targets for chosen, _ in pairs], device=device)
            losses_P = losses_P - self.sft_weight * chosen_P / tokens_P
        right_P = (margin_P > 0).float()
        watched = (losses_P, reward_chosen_P, reward_rejected_P, margin_P, right_P, chosen_P, rejected_P)
        return Sums(losses_P.sum(), torch.stack([values_P.detach().sum() for values_P in watched]))


def preference_losses(margin_P: Tensor, beta: float, kind: PreferenceKind, label_smoothing: float) -> Tensor:
    """The loss of each pair by its margin, the chosen answer's reward less the rejected one's.

    ``sigmoid`` is Rafailov et al.; with ``label_smoothing`` that share of the pairs counts as labelled the wrong way
    round (Mitchell 2023, "A note on DPO with noisy preferences"). ``ipo`` draws the difference of the log-ratios to
    1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036, equation 17).
    """
    if kind == "ipo":
        return (margin_P / beta - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)


def answer_log_probabilities(model: nn.Module, batch: Collated, chunk: int) -> Tensor:
    """The log-probability in nats of each sequence's target tokens together, a vector over the batch in float32."""
    tokens_N = log_probabilities_of(model, batch.inputs, batch.labels_BT, chunk)
    row_N = (batch.labels_BT[:, 1:] != IGNORE).nonzero()[:, 0]
    return tokens_N.new_zeros(len(batch.labels_BT)).index_add(0, row_N, tokens_N)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base alone answers inside.

    PEFT's ``disable_adapter`` also freezes the adapter meanwhile, and FSDP2 must not see that: in its first forward
    pass, which is the reference's, it takes the dtype of the gradients from what is trained. With nothing trained they
    stay in that of the computation, and the first backward pass in bfloat16 ends with an error.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
