"""Learning from a larger model's distribution over the next token, not from the token alone.

    objective = distillation(config, device)   # beside a sharded student, on every rank
    train(model, batches, config, objective=objective, ...)

Hinton et al. 2015, arXiv:1503.02531: the loss is (1 - weight) times cross-entropy plus weight times T^2 times
KL(teacher || student), both softened by the temperature T. The teacher is frozen, in evaluation mode, and sharded by
FSDP2, also beside a student of DeepSpeed's. Its logits exist, like the student's, for a chunk of target tokens at a
time: the student's forward pass runs within the teacher's, where FSDP2 has the weights of its head gathered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from workbench.errors import UserError
from workloads.sources import check_weights, read_config, read_tokenizer
from workloads.training.adapters import load_base
from workloads.training.batches import Row, collate
from workloads.training.chunked_loss import at_targets, cross_entropy, loss_of
from workloads.training.config import DistillableConfig, DistillConfig
from workloads.training.fsdp import shard
from workloads.training.objective import Sums

REST = 1e-6
"""The least probability that tokens beyond the teacher's ``top_k`` count as having together."""


def distillation(config: DistillableConfig, device: torch.device) -> "Distillation | None":
    """The objective with its teacher loaded on ``device`` and sharded; None where nothing is distilled. Collective."""
    distill = config.distill
    if distill is None:
        return None
    teacher = load_base(distill.teacher, config.compute_dtype, "none", device).eval().requires_grad_(False)
    if dist.is_initialized() and config.strategy != "single":
        shard(teacher, getattr(torch, config.compute_dtype))
    return Distillation(teacher, distill.weight, distill.temperature, distill.top_k, config.loss_chunk)


@dataclass(frozen=True)
class Distillation:
    """The loss per target token. Watched are cross-entropy and, as ``teacher_kl``, the divergence from the teacher at
    the temperature, both in nats."""

    teacher: nn.Module
    share: float
    temperature: float
    top_k: int
    chunk: int
    figures: tuple[str, ...] = field(default=("teacher_kl",), init=False)

    def weight(self, row: Row) -> int:
        """Its target tokens."""
        return row.targets

    def __call__(self, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Sums:
        """The loss over the target tokens of ``rows``."""
        batch = collate(rows, device)
        found: list[Sums] = []

        def beside(hidden_NH: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
            """Within the teacher's forward pass; it gives nothing back that FSDP could take for its own output."""
            teacher = _InOrder(hidden_NH, logits_of)

            def mixed(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
                soft = divergence(logits_CV, teacher.next(len(labels_C)), self.temperature, self.top_k)
                hard = cross_entropy(logits_CV, labels_C)
                return (1 - self.share) * hard + self.share * self.temperature**2 * soft

            losses = loss_of(model, batch.inputs, batch.labels_BT, mixed, self.chunk)
            soft = losses.objective.detach() - (1 - self.share) * losses.cross_entropy
            kl = soft / (self.share * self.temperature**2)
            found.append(Sums(losses.objective, torch.stack((losses.cross_entropy, kl))))

        at_targets(
            self.teacher, batch.inputs, batch.labels_BT,
            lambda logits_NV, _: beside(logits_NV, lambda piece_CV: piece_CV),
            (lambda hidden_NH, _, logits_of, __: beside(hidden_NH, logits_of)) if self.chunk else None,
        )  # fmt: skip
        if isinstance(self.teacher, FSDPModule):
            self.teacher.reshard()  # a root keeps its weights gathered, for a backward pass that never comes
        return found[0]


class _InOrder:
    """The teacher's logits of the next so many target tokens: the loss asks for its chunks in order, each once."""

    def __init__(self, hidden_NH: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
        self._hidden_NH, self._logits_of, self._given = hidden_NH, logits_of, 0

    def next(self, count: int) -> Tensor:
        self._given += count
        return self._logits_of(self._hidden_NH[self._given - count : self._given])


def divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """KL(teacher || student) in nats at ``temperature``, summed over the N tokens.

    With ``top_k`` the teacher's likeliest tokens are told apart and all others count as one. Of vocabularies that are
    padded to different widths the common part counts.
    """
    width = min(student_NV.shape[-1], teacher_NV.shape[-1])
    own_NV, other_NV = (
        F.log_softmax(logits_NV[:, :width].to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature, -1)
        for logits_NV in (student_NV, teacher_NV)
    )
    if 0 < top_k < width:
        top_NK = other_NV.topk(top_k).indices
        own_NV, other_NV = (_with_rest(logs_NV.gather(-1, top_NK)) for logs_NV in (own_NV, other_NV))
    return F.kl_div(own_NV, other_NV, reduction="sum", log_target=True)


def _with_rest(logs_NK: Tensor) -> Tensor:
    """The log-probabilities, and that of everything else."""
    rest_N1 = 1 - logs_NK.exp().sum(-1, keepdim=True)
    return torch.cat((logs_NK, rest_N1.clamp(min=REST).log()), -1)


def check_teacher(distill: DistillConfig, tokenizer: Any, length: int) -> None:
    """Raise UserError for a teacher that cannot be read, that reads other tokens than ``tokenizer``, or sequences
    shorter than ``length``.

    ``tokenizer`` is the student's; None where it takes the teacher's.
    """
    positions = getattr(read_config("distill.teacher", distill.teacher), "max_position_embeddings", None)
    check_weights("distill.teacher", distill.teacher)
    if positions is not None and positions < length:
        raise UserError(f"distill.teacher: {distill.teacher} reads {positions} tokens: give max_length={positions}")
    theirs = read_tokenizer("distill.teacher", distill.teacher)
    if theirs.eos_token_id is None:
        raise UserError(f"distill.teacher: the tokenizer of {distill.teacher} has no end-of-sequence token")
    if tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), theirs.get_vocab()
    other = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if other:
        example = min(other)
        raise UserError(
            f"distill.teacher: {distill.teacher} reads other tokens than the model that learns: {len(other)} of "
            f"{len(ours)} and {len(theirs)} differ ('{example}' is {ours.get(example)} and {theirs.get(example)}): "
            "give a teacher with the same tokenizer"
        )
