"""One model of the config becomes one ``ray.serve.llm`` deployment: vLLM's arguments, its place and its processes."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.job_secrets import HOOK, secret_names
from cluster.nodes import Node
from cluster.placement import KEEP_VISIBLE, Placement, place
from serve.model_config import ModelConfig, Role, lora_arguments
from workbench.errors import UserError
from workbench.resources import ResourceRequest, plain_request
from workbench.runs import runs_root

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.llm import LLMConfig

CPU_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 32}
"""On a CPU: nothing is compiled, and with a stated cache size vLLM also skips its warm-up forward."""
CPU_STAGES = {**CPU_ENGINE, "enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
"""In pipeline stages: vLLM 0.32 makes what a later stage receives into as it warms up, which it does for compiled
models alone; here the compiler traces and generates nothing."""


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
    """The place of each replica of ``model``, of each data-parallel rank where those are replicas. Raises UserError for
    a request that no host can ever satisfy."""
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
        placement = place(request, nodes, workers=max(1, count * model.data * model.least_replicas))
        return EnginePlace(device, placement, False, [placement.bundle()] * count)
    name, count = f"model '{model.name}'", count * model.data  # one replica starts its data-parallel ranks, too
    if count > len(probe.cards):
        raise UserError(f"{name}: {count} engine workers for one card: lower them, or ask for gpus: all on HOST")
    if count < len(probe.cards):
        raise UserError(
            f"{name}: {probe.host} has {len(probe.cards)} cards: give engine.tensor_parallel_size, "
            "pipeline_parallel_size or data_parallel_size so many"
        )
    # One replica holds all of its workers' CPUs.
    whole = request.model_copy(update={"cpu": model.cpus * count})
    if request.all_on and max(model.least_replicas, model.replicas) > 1:
        raise UserError(f"{name}: {request} is one replica, not {model.replicas}")
    placement = place(whole, nodes, workers=max(1, model.least_replicas))
    return EnginePlace(device, placement, True, [placement.bundle()])


def workers(model: ModelConfig) -> int:
    """Engine workers of one data-parallel rank: tensor times pipeline parallel."""
    return model.tensor * model.stages


def check_engine_arguments(models: list[ModelConfig]) -> None:
    """Raise UserError for an argument that vLLM does not know, with the nearest that it does, and for adapters and
    formats of weights that it cannot serve."""
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
        try:
            lora_arguments(model.adapters)
            check_format(model.source, str(model.engine.get("quantization") or ""))
        except ValueError as error:
            raise UserError(f"model '{model.name}': {error}") from None


def check_format(source: str, asked: str) -> None:
    """Raise ValueError for weights in a format that the installed vLLM does not read: 0.32 has dropped bitsandbytes,
    and reads GGUF by a plugin alone."""
    from importlib.metadata import entry_points

    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    plugins = {point.name for point in entry_points(group="vllm.general_plugins")}
    if source.endswith(".gguf") and not any("gguf" in name for name in plugins):
        raise ValueError(
            "this vLLM reads GGUF by a plugin that is not installed: pip install vllm-gguf-plugin, or serve the "
            "safetensors that it was made of"
        )
    file = Path(source) / "config.json"
    described = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") if file.is_file() else None
    method = asked or str((described or {}).get("quant_method", "")).lower()
    if method and method not in [*QUANTIZATION_METHODS, "gguf"]:
        near = difflib.get_close_matches(method, QUANTIZATION_METHODS, 1)
        hint = (
            f"did you mean '{near[0]}'?" if near else "merge it into 16 bits ('workbench train export'), then quantise "
        )
        hint += "" if near else "as it loads: quantization: fp8_per_tensor or int8_per_channel_weight_only"
        raise ValueError(f"vLLM does not read weights in '{method}'; {hint}")


@dataclass(frozen=True)
class Served:
    """A model as the gateway sees it: its engine's deployment, what it is for, and the names of its adapters, which
    are asked for as models of their own. The engine tells them apart by the request's ``model``."""

    config: "LLMConfig"
    deployment: "Application"
    role: Role
    adapters: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name that clients ask for."""
        return str(self.config.model_id)


def served(model: ModelConfig, place: EnginePlace, layers: Sequence[int] = ()) -> Served:
    """``model`` at ``place``, its pipeline stages of ``layers`` (none: as vLLM divides). Serve keeps its replicas over
    a new ``serve up`` as long as neither has changed; how many there are may change."""
    from ray.serve.llm import build_llm_deployment

    config = llm_config(model, place, layers)
    application = build_llm_deployment(config, name_prefix=f"{model.role}:")
    settings = model.model_dump(mode="json", exclude={"replicas", "autoscaling"})
    told = json.dumps([settings, place.device, place.inside, place.bundles, place.placement.env_vars, list(layers)])
    bound = application._bound_deployment  # Serve has no public way to say that a deployment is the same as before
    application._bound_deployment = bound.options(version=hashlib.sha256(told.encode()).hexdigest(), _internal=True)
    return Served(config, application, model.role, tuple(model.adapters))


def llm_config(model: ModelConfig, place: EnginePlace, layers: Sequence[int] = ()) -> "LLMConfig":
    """The deployment of ``model`` at ``place``."""
    from ray.serve.llm import LLMConfig

    device = place.device
    local = Path(model.source).is_absolute()
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if local:
        variables["HF_HUB_OFFLINE"] = "1"  # a local folder needs no hub, and must not wait for one
    if layers:
        variables["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, layers))
    if device == "cpu":
        variables["OMP_NUM_THREADS"] = str(model.threads)
    if device == "gpu":
        variables |= KEEP_VISIBLE  # the replica itself holds no card, and looks at them
    hook = {"worker_process_setup_hook": HOOK} if secret_names() else {}  # Ray Serve LLM would put its own there
    only = place.placement.label_selector
    selector = {"placement_group_bundle_label_selector": [only] * len(place.bundles)} if only else {}
    skip_download = {"callback_config": {"callback_class": "serve.vllm_server.LocalFolder"}} if local else {}
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": model.source},
        # "cpu" is ray.serve.llm's word for vLLM's own executor, which also takes the cards it sees
        accelerator_config={"kind": "cpu" if place.inside else device},
        placement_group_config={"bundles": place.bundles, "strategy": "STRICT_PACK" if selector else "PACK"},
        engine_kwargs={
            **((CPU_STAGES if model.stages > 1 else CPU_ENGINE) if device == "cpu" else {}),
            **({"runner": "pooling", "convert": "embed"} if model.role == "embedding" else {}),
            **lora_arguments(model.adapters),
            "profiler_config": {
                "profiler": "torch",
                "torch_profiler_dir": str(traces_folder(model.name)),
                "ignore_frontend": True,
                "torch_profiler_with_stack": False,
            },  # nothing is profiled before 'serve trace' asks for it
            **model.engine,
        },
        runtime_env={"env_vars": {**variables, **model.environment, **place.placement.env_vars}, **hook},
        deployment_config={
            "name": model.name,
            **_replicas(model),
            "max_constructor_retry_count": 1,  # a model that cannot load will not load the third time either
            "ray_actor_options": {"num_cpus": 0},  # the engine's bundle pays for the replica
            **selector,
        },
        experimental_configs={
            "adapters": model.adapters,
            "warm_up": model.warm_up,
            "stream_batching_interval_ms": model.stream_interval_ms,
        },
        server_cls=f"serve.vllm_server.{_server(model, place)}",
        **skip_download,
    )


def traces_folder(model: str) -> Path:
    """Where the workers of a model's engines write what torch.profiler saw; their hosts share it."""
    return runs_root() / ".engine-traces" / hashlib.sha256(model.encode()).hexdigest()[:16]


def _replicas(model: ModelConfig) -> dict[str, Any]:
    if model.autoscaling is None:
        return {"num_replicas": model.replicas}
    return {"autoscaling_config": model.autoscaling.model_dump()}


def _server(model: ModelConfig, place: EnginePlace) -> str:
    """The deployment class: ranks that are data-parallel are a gang of replicas, unless one replica holds all cards."""
    if model.data > 1 and not place.inside:
        return "DataParallelServer"
    return "SingleWorkerServer" if place.device == "cpu" and workers(model) * model.data == 1 else "Server"
