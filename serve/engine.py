"""One model of the config becomes one ``ray.serve.llm`` deployment: vLLM's arguments, its place and its processes."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from workbench.config import UNVISITED, Config, resolve_path
from workbench.errors import UserError

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


class ModelConfig(Config):
    """One served model."""

    name: str = Field(description="Model name that clients ask for", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: Annotated[str, AfterValidator(_source)] = Field(description="Model folder, or a hub name (owner/model)")
    engine: dict[str, Any] = Field(default={}, description="vLLM engine arguments: max_model_len, dtype, ...")
    replicas: int = Field(default=1, ge=1, description="Copies of the engine")
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="Where the engine runs; auto: gpu if the cluster has any"
    )
    cpus: float = Field(default=0.5, gt=0, description="Ray CPUs per engine worker")
    gpus: float = Field(default=1.0, gt=0, le=1, description="Ray GPUs per engine worker; a fraction shares a card")
    resources: dict[str, float] = Field(default={}, description="Further Ray resources per worker, to pin it to a card")
    threads: int = Field(default=1, ge=1, description="OpenMP threads of a CPU engine")
    environment: dict[str, str] = Field(default={}, description="Environment variables of the engine's processes")

    @field_validator("engine")
    @classmethod
    def _no_name_in_engine(cls, engine: dict[str, Any]) -> dict[str, Any]:
        for key in ("model", "served_model_name"):
            if key in engine:
                raise ValueError(f"'{key}' is set by the model's 'name' and 'source'")
        return engine


def workers(model: ModelConfig) -> int:
    """Engine workers in one replica: tensor times pipeline parallel."""
    return int(model.engine.get("tensor_parallel_size", 1)) * int(model.engine.get("pipeline_parallel_size", 1))


def bundle(model: ModelConfig, device: str) -> dict[str, float]:
    """The Ray resources of one engine worker."""
    gpu = {"GPU": model.gpus} if device == "gpu" else {}
    return {"CPU": model.cpus, **gpu, **model.resources}


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


def llm_config(model: ModelConfig, device: Literal["cpu", "gpu"]) -> "LLMConfig":
    """The deployment of ``model`` on ``device``."""
    from ray.serve.llm import LLMConfig

    local = Path(model.source).is_absolute()
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if local:
        variables["HF_HUB_OFFLINE"] = "1"  # a local folder needs no hub, and must not wait for one
    if device == "cpu":
        variables["OMP_NUM_THREADS"] = str(model.threads)
    single = device == "cpu" and workers(model) == 1
    skip_download = {"callback_config": {"callback_class": "serve.vllm_server.LocalFolder"}} if local else {}
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": model.source},
        accelerator_config={"kind": device},
        placement_group_config={"bundle_per_worker": bundle(model, device)},
        engine_kwargs={**(CPU_ENGINE if device == "cpu" else {}), **model.engine},
        runtime_env={"env_vars": {**variables, **model.environment}},
        deployment_config={
            "num_replicas": model.replicas,
            "max_constructor_retry_count": 1,  # a model that cannot load will not load the third time either
            "ray_actor_options": {"num_cpus": 0},  # the engine's bundle pays for the replica
        },
        server_cls="serve.vllm_server." + ("SingleWorkerServer" if single else "Server"),
        **skip_download,
    )
