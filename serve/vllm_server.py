"""vLLM under ``ray.serve.llm``, with its tokenizer endpoint working, adapters from folders, a warm-up, and, on a CPU,
with half of the processes.

Each process of an engine imports vLLM for some ten seconds of CPU time and holds 0.8 GB. ``ray.serve.llm`` 2.60
starts the replica, a task that looks for the model's files, vLLM's engine core and, on a CPU, a worker under the
multiprocessing executor. A model in a local folder needs no task, and an engine of one worker no worker process.
"""

from typing import TYPE_CHECKING, Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.llm._internal.serve.serving_patterns.data_parallel.dp_server import DPServer
from ray.serve.llm.deployment import LLMServer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs


class LocalFolder(CallbackBase):
    """The model lies in a folder that the replica can read: nothing to download on any node."""

    async def on_before_node_init(self) -> None:
        """Tell ray.serve.llm to skip its download task."""
        self.ctx.run_init_node = False


class Engine(VLLMEngine):
    """vLLM 0.32 renamed the attribute that ray.serve.llm 2.60 reads for ``/tokenize``, which then answers 400, and
    ray.serve.llm loads adapters from cloud storage alone."""

    async def start(self) -> None:
        """Start, hand over the tokenization service under its new name, load the adapters, and answer the warm-up.

        Raises RuntimeError for an adapter that vLLM refuses, or a warm-up without an answer.
        """
        await super().start()
        self._oai_serving_tokenization = self._app_state.serving_tokenization
        for name, folder in self.llm_config.experimental_configs["adapters"].items():
            await self._load_adapter(name, folder)
        if prompt := self.llm_config.experimental_configs["warm_up"]:
            await self._answer(prompt)

    async def _load_adapter(self, name: str, folder: str) -> None:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        told = await self._oai_models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=folder))
        if isinstance(told, ErrorResponse):
            raise RuntimeError(f"adapter {name} of {folder}: {told.error.message}")

    async def _answer(self, prompt: str) -> None:
        from ray.llm._internal.serve.core.configs.openai_api_models import (
            CompletionRequest,
            EmbeddingCompletionRequest,
            ErrorResponse,
        )

        if self._oai_serving_completion is None:
            answers = self.embeddings(EmbeddingCompletionRequest(model=self.llm_config.model_id, input=prompt))
        else:
            answers = self.completions(CompletionRequest(model=self.llm_config.model_id, prompt=prompt, max_tokens=8))
        async for answer in answers:
            if isinstance(answer, ErrorResponse):
                raise RuntimeError(f"the warm-up had no answer: {answer.error.message}")


class SingleWorkerEngine(Engine):
    """vLLM whose engine core runs the one CPU worker itself.

    vLLM insists on a worker process of its own because it sets OpenMP's variables for it; here they come from the
    replica's runtime environment (``OMP_NUM_THREADS``), which the engine core inherits.
    """

    def _start_async_llm_engine(
        self, vllm_engine_args: "AsyncEngineArgs", vllm_engine_config: "VllmConfig", placement_group: Any
    ) -> Any:
        vllm_engine_config.parallel_config.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


class Server(LLMServer):
    """The deployment class that uses ``Engine``."""

    _default_engine_cls = Engine


class SingleWorkerServer(LLMServer):
    """The deployment class that uses ``SingleWorkerEngine``."""

    _default_engine_cls = SingleWorkerEngine


class DataParallelServer(DPServer):
    """Data-parallel attention: a gang of replicas, each a rank of one engine (``ray.serve.llm``'s own), with
    ``Engine``."""

    _default_engine_cls = Engine
