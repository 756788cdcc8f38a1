"""One model of the config becomes one ``ray.serve.llm`` deployment: vLLM's arguments, its place and its processes."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from cluster.job_secrets import HOOK, secret_names
from cluster.nodes import Node
from cluster.placement import KEEP_VISIBLE, Placement, place
from workbench.config import UNVISITED, resolve_path
from workbench.errors import UserError
from workbench.resources import Placed, ResourceRequest, plain_request

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

CPU_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 32}
"""On a CPU: nothing is compiled, and with a stated cache size vLLM also skips its warm-up forward."""


def _source(value: str, info: ValidationInfo) -> str:
    """A folder that must exist where the text looks like a path or names one, else a hub name, unchanged."""
    if info.context is UNVISITED:
        return value
    looks_like_path = value.startswith((".", "/", "~", "runs/")) or Path(value).exists()
    if not looks_like_path:
        return value
    try:
        path = resolve_path(Path(value))
    except UserError as error:
        raise ValueError(str(error)) from error
    if not (path / "config.json").is_file():
        raise ValueError(f"no model there: {path / 'config.json'} does not exist")
    return str(path)


class ModelConfig(Placed):
    """One served model; ``resources`` is what one engine worker gets."""

    amounts: ClassVar[tuple[str, str]] = ("cpus", "gpus")
    several: ClassVar[bool] = True

    name: str = Field(description="Model name that clients ask for", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: Annotated[str, AfterValidator(_source)] = Field(description="Model folder, or a hub name (owner/model)")
    engine: dict[str, Any] = Field(default={}, description="vLLM engine arguments: max_model_len, dtype, ...")
    replicas: int = Field(default=1, ge=1, description="Copies of the engine")
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="Where the engine runs; auto: gpu if the cluster has any"
    )
    cpus: float = Field(default=0.5, gt=0, description="Ray CPUs per engine worker")
    gpus: float = Field(default=1.0, ge=0, le=1, description="Ray GPUs per engine worker; a fraction shares a card")
    threads: int = Field(default=1, ge=1, description="OpenMP threads of a CPU engine")
    environment: dict[str, str] = Field(default={}, description="Environment variables of the engine's processes")

    @field_validator("engine")
    @classmethod
    def _no_name_in_engine(cls, engine: dict[str, Any]) -> dict[str, Any]:
        for key in ("model", "served_model_name"):
            if key in engine:
                raise ValueError(f"'{key}' is set by the model's 'name' and 'source'")
        return engine

    @model_validator(mode="after")
    def _one_device(self) -> "ModelConfig":
        asked = self.resources
        if asked is None:
            if self.device == "gpu" and not self.gpus:
                raise ValueError("device gpu with gpus 0: leave one of them out")
            return self
        if isinstance(asked.gpus, int):
            raise ValueError("tensor_parallel_size says how many cards: give resources.gpu, or gpus: all on HOST")
        if asked.mps:
            raise ValueError("vLLM has no build for a Mac's GPU")
        if self.device != "auto" and (self.device == "gpu") != (asked.device == "cuda"):
            raise ValueError(f"device {self.device} contradicts resources ({asked}): leave device out")
        return self


@dataclass(frozen=True)
class EnginePlace:
    """Where an engine runs. ``inside``: its workers are processes of the replica, which holds the cards for them.

    vLLM's Ray executor wants a ``GPU`` in each worker's bundle, which a reserved card is not; its own executor takes
    the cards that CUDA_VISIBLE_DEVICES lists, all of them on the replica's host.
    """

    device: Literal["cpu", "gpu"]
    placement: Placement
    inside: bool
    bundles: list[dict[str, float]]


def engine_place(model: ModelConfig, nodes: Sequence[Node]) -> EnginePlace:
    """The place of each replica of ``model``. Raises UserError for a request that no host can ever satisfy."""
    count = workers(model)
    cards = any(node.total.get("GPU", 0) for node in nodes)
    request: ResourceRequest
    if model.resources is not None:
        request = model.request()
    else:
        on_card = model.device == "gpu" or (model.device == "auto" and cards and model.gpus > 0)
        request = plain_request(model.cpus, model.gpus if on_card else 0)
    device: Literal["cpu", "gpu"] = "gpu" if request.device == "cuda" else "cpu"
    probe = place(request, nodes)
    if not probe.visible:
        placement = place(request, nodes, workers=count * model.replicas)
        return EnginePlace(device, placement, False, [placement.bundle()] * count)
    name = f"model '{model.name}'"
    if count > len(probe.cards):
        raise UserError(f"{name}: {count} engine workers for one card: lower them, or ask for gpus: all on HOST")
    if count < len(probe.cards):
        raise UserError(f"{name}: {probe.host} has {len(probe.cards)} cards: give engine.tensor_parallel_size so many")
    # One replica holds all of its workers' CPUs.
    whole = request.model_copy(update={"cpu": model.cpus * count})
    if request.all_on and model.replicas > 1:
        raise UserError(f"{name}: {request} is one replica, not {model.replicas}")
    placement = place(whole, nodes, workers=model.replicas)
    return EnginePlace(device, placement, True, [placement.bundle()])


def workers(model: ModelConfig) -> int:
    """Engine workers in one replica: tensor times pipeline parallel."""
    return int(model.engine.get("tensor_parallel_size", 1)) * int(model.engine.get("pipeline_parallel_size", 1))


def check_engine_arguments(models: list[ModelConfig]) -> None:
    """Raise UserError for an argument that vLLM does not know, with the nearest that it does."""
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    known = [field.name for schema in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(schema)]
    for model in models:
        for key in model.engine:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean '{near[0]}'?" if near else "see vLLM's engine arguments"
                raise UserError(f"model '{model.name}': vLLM has no engine argument '{key}'; {hint}")


def llm_config(model: ModelConfig, place: EnginePlace) -> "LLMConfig":
    """The deployment of ``model`` at ``place``."""
    from ray.serve.llm import LLMConfig

    device = place.device

    local = Path(model.source).is_absolute()
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if local:
        variables["HF_HUB_OFFLINE"] = "1"  # a local folder needs no hub, and must not wait for one
    if device == "cpu":
        variables["OMP_NUM_THREADS"] = str(model.threads)
    if device == "gpu":
        variables |= KEEP_VISIBLE  # the replica itself holds no card, and looks at them
    hook = {"worker_process_setup_hook": HOOK} if secret_names() else {}  # Ray Serve LLM would put its own there
    only = place.placement.label_selector
    selector = {"placement_group_bundle_label_selector": [only] * len(place.bundles)} if only else {}
    single = device == "cpu" and workers(model) == 1
    skip_download = {"callback_config": {"callback_class": "serve.vllm_server.LocalFolder"}} if local else {}
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": model.source},
        # "cpu" is ray.serve.llm's word for vLLM's own executor, which also takes the cards it sees
        accelerator_config={"kind": "cpu" if place.inside else device},
        placement_group_config={"bundles": place.bundles, "strategy": "STRICT_PACK" if selector else "PACK"},
        engine_kwargs={**(CPU_ENGINE if device == "cpu" else {}), **model.engine},
        runtime_env={"env_vars": {**variables, **model.environment, **place.placement.env_vars}, **hook},
        deployment_config={
            "num_replicas": model.replicas,
            "max_constructor_retry_count": 1,  # a model that cannot load will not load the third time either
            "ray_actor_options": {"num_cpus": 0},  # the engine's bundle pays for the replica
            **selector,
        },
        server_cls="serve.vllm_server." + ("SingleWorkerServer" if single else "Server"),
        **skip_download,
    )
