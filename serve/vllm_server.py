"""vLLM under ``ray.serve.llm``, with its tokenizer endpoint working and, on a CPU, with half of the processes.

Each process of an engine imports vLLM for some ten seconds of CPU time and holds 0.8 GB. ``ray.serve.llm`` 2.60
starts the replica, a task that looks for the model's files, vLLM's engine core and, on a CPU, a worker under the
multiprocessing executor. A model in a local folder needs no task, and an engine of one worker no worker process.
"""

from typing import TYPE_CHECKING, Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
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
    """vLLM 0.32 renamed the attribute that ray.serve.llm 2.60 reads for ``/tokenize``, which then answers 400."""

    async def start(self) -> None:
        """Start, then hand over the tokenization service under its new name."""
        await super().start()
        self._oai_serving_tokenization = self._app_state.serving_tokenization


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
