"""DeepSpeed's ZeRO-2 and ZeRO-3 in the place of FSDP2: the same model, loop and checkpoints, another engine.

    optimizer = ZeroOptimizer(model, AdamW(...), stage=3, clip=1.0, computed=torch.bfloat16)
    train(model, ..., optimizer=optimizer)

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) shards over the ranks the optimizer's state and the float32 weights
that it updates (stage 1), the gradients too (stage 2), and the weights of the model as well (stage 3), each parameter
in equal flat pieces, whatever its dtype: the bytes of 4-bit weights and of their scales too. ``model`` keeps its
modules and names; hooks on them gather what is sharded when it computes.

Checkpoints are those of every other strategy: trained weights and moments are gathered one parameter at a time, and a
rank keeps its rows of each on the CPU, as FSDP2 would have cut it.
See https://deepspeed.readthedocs.io/en/latest/zero3.html.
"""

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from workbench.errors import UserError
from workloads.training.chunked_loss import head_of
from workloads.training.config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_installed(config: TrainingConfig) -> None:
    """Raise UserError where ``config`` asks for DeepSpeed and there is none."""
    if config.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"strategy={config.strategy} is DeepSpeed's, which is not installed (macOS has no build of it): give "
            "strategy=fsdp2, or on Linux install deepspeed==0.19.8"
        )


class ZeroOptimizer:
    """AdamW over this rank's shards of ``model``'s trained parameters; ``engine`` is what a training pass calls.

    Weights are computed with in ``computed`` and updated in float32. The gradient's norm is cut to ``clip``.
    Collective: every rank makes one at the same time. ``model`` is on its device; the environment has ``LOCAL_RANK``,
    as Ray Train sets it, which DeepSpeed insists on.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, stage: int, clip: float, computed: torch.dtype
    ) -> None:
        import deepspeed

        self.model, self._optimizer = model, optimizer
        parameters = list(model.named_parameters())
        for _, parameter in parameters:
            parameter.stored_dtype = parameter.dtype
        _use_torch_collectives()
        self.engine, self._zero, *_ = deepspeed.initialize(
            SimpleNamespace(device_rank=parameters[0][1].device.index or 0), model, optimizer,
            config=_settings(model, stage, clip, computed), dist_init_required=False,
        )  # fmt: skip
        if stage == 3:
            causal, head = head_of(model)
            for weight in head:  # the loss takes the head's gradient outside of the head: ``chunked_loss.py``
                deepspeed.zero.register_external_parameter(causal, weight)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's own, whose learning rate may be set."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to this rank's shards of the gradient. ``last`` of the micro-batches of a step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def update(self) -> Tensor:
        """Clip and step; returns the gradient's norm before. One that is no finite number changes nothing."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else float("nan")
        return torch.as_tensor(norm)

    def copies(self, group: dist.ProcessGroup) -> tuple[nn.Module, torch.optim.Optimizer]:
        """This rank's rows of the trained weights and their moments in float32, on the CPU: what a checkpoint has of
        any strategy. ``group`` is of all ranks, over gloo. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        weights = copy_of(self.model, group)
        optimizer = torch.optim.AdamW(weights.parameters())
        optimizer.param_groups[0] |= {key: value for key, value in self.param_groups[0].items() if key != "params"}
        step = self._optimizer.state.get(self._flat[0], {}).get("step", torch.tensor(0.0))
        for (_, parameter), copy in zip(_trained(self.model), weights.parameters(), strict=True):
            moments = {key: safe_get_full_optimizer_state(parameter, key) if step else None for key in MOMENTS}
            optimizer.state[copy] = {"step": step.cpu().clone()} | {
                key: torch.zeros_like(copy) if whole is None else _rows(whole, group) for key, whole in moments.items()
            }
        return weights, optimizer

    def take(self, weights: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on from ``copies`` that a checkpoint was loaded into. Collective."""
        from deepspeed.utils import safe_set_full_optimizer_state

        give_back(weights, self.model)
        self._begin(next(iter(optimizer.state.values()))["step"])
        for (_, parameter), copy in zip(_trained(self.model), weights.parameters(), strict=True):
            for key in MOMENTS:
                whole = optimizer.state[copy][key].full_tensor().to(parameter.device)
                safe_set_full_optimizer_state(parameter, whole, key)

    @property
    def _flat(self) -> list[Tensor]:
        """The float32 weights that AdamW updates: this rank's pieces of all parameters, end to end."""
        stage_2: list[Tensor] | None = getattr(self._zero, "single_partition_of_fp32_groups", None)
        return self._zero.fp32_partitioned_groups_flat if stage_2 is None else stage_2

    def _begin(self, step: Tensor) -> None:
        """Make AdamW's state, which else exists after its first step."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat in self._flat:
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self._optimizer.state[flat] = {"step": step.clone(), **moments}
        for group, flat in zip(getattr(self._zero, "bit16_groups", ()), self._flat, strict=False):
            lazy_init_hp_params_optimizer_state(group, flat, self._optimizer.state)


AnyOptimizer = torch.optim.Optimizer | ZeroOptimizer


def is_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed has the parameters of ``model``."""
    return any(hasattr(parameter, "stored_dtype") for parameter in model.parameters())


def whole_of(parameter: nn.Parameter) -> Tensor:
    """A trained parameter of DeepSpeed's, whole, in float32. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Tensor = safe_get_full_fp32_param(parameter)
    return whole.detach()


def copy_of(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """This rank's rows of the trained weights of ``model`` in float32, on the CPU, by the same names. Collective."""
    copy = nn.Module()
    for name, parameter in _trained(model):
        *path, own = name.split(".")
        owner = copy
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(own, nn.Parameter(_rows(whole_of(parameter), group)))
    return copy


def give_back(copy: nn.Module, model: nn.Module) -> None:
    """Give ``model`` the weights of a ``copy_of`` it. Collective."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    weights = dict(copy.named_parameters())
    for name, parameter in _trained(model):
        if stage_3 := getattr(parameter, "_z3_optimizer", None):
            stage_3.empty_partition_cache()  # lets go of what was gathered ahead for a pass that does not come
        row: Any = weights[name].detach()
        whole = row.full_tensor().to(parameter.device)
        safe_set_full_fp32_param(parameter, whole)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.data.copy_(whole)  # what it computes with


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _rows(whole: Tensor, group: dist.ProcessGroup) -> DTensor:
    mesh = DeviceMesh.from_group(group, "cpu")
    return distribute_tensor(whole.detach().float().cpu(), mesh, [Shard(0)], src_data_rank=None)


def _settings(model: nn.Module, stage: int, clip: float, computed: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration: its bucket and what it leaves unsharded are as large as the model suggests, by the
    rule of Transformers' integration. See https://www.deepspeed.ai/docs/config-json/.

    Nothing is gathered ahead: weights that the prefetcher passed over are not let go (``__params_to_release`` in
    ``partitioned_param_coordinator.py``), and after a forward pass all of them were whole.
    """
    config: Any = model.config
    width = config.get_text_config(decoder=True).hidden_size
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own counters alone
        "gradient_clipping": clip,
        "bf16": {"enabled": computed == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": width * width,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 10 * width,
            "stage3_max_reuse_distance": 0,  # a weight that was used is let go, whenever it comes again
        },
    }


def _use_torch_collectives() -> None:
    """On a CPU DeepSpeed would first compile collectives of its own over shared memory, for minutes: have gloo's."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
