"""One model of a serving config: where it comes from, what it is for, how its engine runs and where.

models:
  - name: assistant
    source: runs/train-sft/latest             # a folder, a run, a GGUF file, or a hub name
    adapters: {poet: runs/train-sft/20261122T051500}
    engine: {tensor_parallel_size: 2, max_model_len: 32768}   # vLLM's own arguments
    resources: {gpu: rtx-pro-6000}
    autoscaling: {min_replicas: 1, max_replicas: 4}
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from serve.source import adapter_source, model_source
from workbench.config import Config
from workbench.resources import Placed

Role = Literal["chat", "embedding"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
MULTIPLES = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}
"""As vLLM's own command line reads them."""


def token_count(key: str, given: Any) -> int:
    """A number of tokens as typed: 32768, or 32k (32,000), 32K (32,768). -1 is vLLM's own choice of ``max_model_len``.
    Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", str(given).strip())
    count = int(found[1]) * MULTIPLES.get(found[2], 1) if found else 0
    if key == "max_model_len" and given in (-1, "-1", "auto"):
        return -1
    if isinstance(given, bool) or count < 1:
        raise ValueError(f"'{key}' is a number of tokens such as 32768, 32k or 32K, not {given!r}")
    return count


class Autoscaling(Config):
    """Replicas by load: Serve keeps ``target_ongoing_requests`` at each."""

    min_replicas: int = Field(default=1, ge=0, description="At least; 0 stops an idle engine, whose start then waits")
    max_replicas: int = Field(default=2, ge=1, description="At most")
    target_ongoing_requests: float = Field(default=16.0, gt=0, description="Requests in flight at each replica")
    upscale_delay_s: float = Field(default=30.0, ge=0, description="Seconds of more load before a replica is added")
    downscale_delay_s: float = Field(default=600.0, ge=0, description="Seconds of less load before one is stopped")

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.max_replicas < max(1, self.min_replicas):
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class ModelConfig(Placed):
    """One served model; ``resources`` is what one engine worker gets."""

    amounts: ClassVar[tuple[str, str]] = ("cpus", "gpus")
    several: ClassVar[bool] = True

    name: str = Field(description="Model name that clients ask for", pattern=NAME)
    source: Annotated[str, AfterValidator(model_source)] = Field(
        description="Model folder, run folder, GGUF file, or hub name (owner/model)"
    )
    role: Role = Field(default="chat", description="chat: writes text; embedding: gives vectors")
    adapters: dict[Annotated[str, Field(pattern=NAME)], Annotated[str, AfterValidator(adapter_source)]] = Field(
        default={}, description="LoRA adapters by the model name that asks for them: folders or runs"
    )
    engine: dict[str, Any] = Field(default={}, description="vLLM engine arguments: max_model_len, dtype, ...")
    layers: Literal["even", "by memory"] | list[Annotated[int, Field(ge=1)]] = Field(
        default="even", description="Layers of each pipeline stage; by memory: as each stage's card can hold"
    )
    replicas: int = Field(default=1, ge=1, description="Copies of the engine")
    autoscaling: Autoscaling | None = Field(default=None, description="Replicas by load, in place of replicas")
    warm_up: str = Field(default="", description="A prompt that each replica answers before it is asked anything else")
    stream_interval_ms: float = Field(
        default=10.0, ge=0, description="Tokens of a stream that come within it are sent together; 0: each by itself"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="Where the engine runs; auto: gpu if the cluster has any"
    )
    cpus: float = Field(default=0.5, gt=0, description="Ray CPUs per engine worker")
    gpus: float = Field(default=1.0, ge=0, le=1, description="Ray GPUs per engine worker; a fraction shares a card")
    threads: int = Field(default=1, ge=1, description="OpenMP threads of a CPU engine")
    environment: dict[str, str] = Field(default={}, description="Environment variables of the engine's processes")

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return int(self.engine.get("tensor_parallel_size", 1))

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return int(self.engine.get("pipeline_parallel_size", 1))

    @property
    def data(self) -> int:
        """Data-parallel ranks of a mixture of experts, each with its own attention."""
        return int(self.engine.get("data_parallel_size", 1))

    @property
    def expert(self) -> bool:
        """Whether the experts are divided whole."""
        return bool(self.engine.get("enable_expert_parallel", False))

    @property
    def least_replicas(self) -> int:
        """Replicas that must find room at once."""
        return self.autoscaling.min_replicas if self.autoscaling else self.replicas

    @field_validator("engine")
    @classmethod
    def _engine(cls, engine: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for key in ("model", "served_model_name"):
            if key in engine:
                raise ValueError(f"'{key}' is set by the model's 'name' and 'source'")
        for key in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if not isinstance(size := engine.get(key, 1), int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"'{key}' is a number of ranks, not {size!r}")
        for key in ("max_model_len", "max_num_batched_tokens"):
            if engine.get(key) is not None:
                engine = {**engine, key: token_count(key, engine[key])}
        share = engine.get("gpu_memory_utilization", 0.9)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"'gpu_memory_utilization' is a share of a card's memory such as 0.9, not {share!r}")
        draft = engine.get("speculative_config")
        if isinstance(draft, dict) and isinstance(draft.get("model"), str):
            return {**engine, "speculative_config": {**draft, "model": model_source(draft["model"], info)}}
        return engine

    @model_validator(mode="after")
    def _agrees(self) -> "ModelConfig":
        if self.autoscaling and "replicas" in self.model_fields_set and self.replicas != 1:
            raise ValueError("replicas and autoscaling: give one of them")
        if self.name in self.adapters:
            raise ValueError(f"an adapter has the name of its base, {self.name}")
        if self.role == "embedding" and self.adapters:
            raise ValueError("adapters of an embedding model are not served")
        if self.layers != "even" and self.stages == 1:
            raise ValueError("layers are those of pipeline stages: give engine.pipeline_parallel_size")
        if isinstance(self.layers, list) and len(self.layers) != self.stages:
            raise ValueError(f"{len(self.layers)} layer counts for {self.stages} pipeline stages")
        return self

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


RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank``."""


def adapter_rank(name: str, folder: str) -> int:
    """The rank of the LoRA adapter in ``folder``. Raises ValueError for one that vLLM cannot serve."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {"": 0}).values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"adapter {name}: {folder}/adapter_config.json cannot be read: {error}") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ValueError(f"adapter {name}: vLLM serves plain LoRA, this is {config.get('peft_type')}")
    if config.get("modules_to_save"):
        raise ValueError(f"adapter {name}: it has whole modules ({config['modules_to_save']}): merge it and serve that")
    if rank > RANKS[-1]:
        raise ValueError(f"adapter {name}: rank {rank} is above vLLM's {RANKS[-1]}")
    return rank


def lora_arguments(adapters: dict[str, str]) -> dict[str, Any]:
    """vLLM's arguments for these adapters. Raises ValueError for one that it cannot serve."""
    if not adapters:
        return {}
    most = max(adapter_rank(name, folder) for name, folder in adapters.items())
    largest = next(rank for rank in RANKS if rank >= most)
    return {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": largest}
