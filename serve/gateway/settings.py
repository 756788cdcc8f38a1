"""The gateway's settings: the ``gateway:`` of a serving config.

gateway:
  defaults: {concurrency: 64, first_token_timeout: 30}
  models:
    tuned: {fallback: [base], price_per_hour: 1.2}
  routes:
    assistant: {base: 0.9, tuned: 0.1}
"""

import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from workbench.config import Config, OutputPath, resolve_path, runs_root


class ModelPolicy(Config):
    """How one model is protected, and what it costs.

    An adapter has the base's engine: there ``concurrency``, ``queue``, ``queue_timeout`` and ``breaker_*`` are the
    base's, the others those of its own name.
    """

    concurrency: int = Field(default=256, ge=1, description="Requests at the engine at once, over all gateway replicas")
    queue: int = Field(default=256, ge=0, description="Requests that may wait for it; past them 503 at once")
    queue_timeout: float = Field(default=30.0, gt=0, description="Seconds a request may wait, then 503")
    first_token_timeout: float = Field(default=60.0, gt=0, description="Seconds to each token of a stream")
    timeout: float = Field(default=600.0, gt=0, description="Seconds of a whole answer")
    retries: int = Field(default=1, ge=0, description="Further attempts at the same model before the first token")
    breaker_failures: int = Field(default=5, ge=1, description="Faults in a row that open the circuit breaker")
    breaker_seconds: float = Field(default=15.0, gt=0, description="Seconds until an open breaker lets one request try")
    fallback: list[str] = Field(default=[], description="Models asked in turn when this one cannot answer")
    price_per_hour: float = Field(default=0.0, ge=0, description="Price of the model's cards for an hour of use")
    watts: float = Field(default=0.0, ge=0, description="Power the model's cards draw in use: energy per request")
    price_per_kwh: float = Field(default=0.0, ge=0, description="Price of that energy")

    @property
    def price_per_second(self) -> float:
        """What a second of use costs, cards and energy."""
        return (self.price_per_hour + self.watts / 1000 * self.price_per_kwh) / 3600


class Upstream(Config):
    """A model of another OpenAI-compatible server."""

    base_url: str = Field(pattern=r"^https?://", description="Its address, /v1 included")
    api_key_file: Path | None = Field(default=None, description="File of the key it wants")
    model: str = Field(default="", description="The model's name there; default: the same as here")


Personal = Literal["email", "phone", "ipv4", "ipv6", "iban", "card", "national_id", "secret"]
"""``data_pipelines.pii.KINDS``, whose import takes a second."""


class RecordConfig(Config):
    """The log of requests that learning needs; off unless a folder is given."""

    folder: OutputPath | None = Field(default=None, description="Folder of Parquet files")
    text: bool = Field(default=False, description="Keep prompts and answers, redacted")
    redact: list[Personal] = Field(
        default=["email", "phone", "ipv4", "ipv6", "iban", "card", "national_id", "secret"],
        description="Kinds of personal data replaced in texts",
    )
    flush_seconds: float = Field(default=10.0, gt=0, description="Rows wait at most so long for their file")


class RagConfig(Config):
    """The documents behind ``/v1/rag/chat/completions``; off unless a collection's Milvus is named."""

    uri: str = Field(default="", description="Milvus Lite folder NAME.db, or a server; empty: no documents")
    collection: str = Field(default="documents", description="Collection to search")
    embedding_model: str = Field(default="", description="Where the collection's model lies now; empty: where it lay")
    mode: str = Field(default="dense", pattern="^(dense|keywords|hybrid)$", description="dense, keywords or hybrid")
    limit: int = Field(default=4, ge=1, le=50, description="Passages given to the model")
    queries: int = Field(default=1, ge=1, le=8, description="Wordings to search with; more are written by the model")
    threshold: float = Field(default=0.3, description="Best dense score below which the documents have no answer")
    template: Path | None = Field(default=None, description="Jinja file of the prompt; default: the built-in one")
    timeout: float = Field(default=10.0, gt=0, description="Seconds for the search, then the answer goes without it")


def _absolute_store(value: str) -> str:
    if not value:
        return f"sqlite:///{runs_root() / '.secrets' / 'gateway.db'}"
    if value.startswith("sqlite:///"):
        return f"sqlite:///{resolve_path(Path(value.removeprefix('sqlite:///')))}"
    return value


class GatewayConfig(Config):
    """Everything the gateway does."""

    store: Annotated[str, AfterValidator(_absolute_store)] = Field(
        default="", description="Keys and counters: sqlite:///FILE (default in RUNS/.secrets) or redis://HOST:6379/0"
    )
    replicas: int = Field(default=1, ge=1, description="Gateway processes")
    max_body_mb: float = Field(default=16.0, gt=0, description="Largest request body; past it 413")
    drain_seconds: float = Field(default=120.0, gt=0, description="Time for answers in flight at shutdown")
    defaults: ModelPolicy = Field(default=ModelPolicy(), description="Policy of every model not named below")
    models: dict[str, ModelPolicy] = Field(default={}, description="Policy by model")
    upstreams: dict[str, Upstream] = Field(default={}, description="Models that other servers hold, by name")
    routes: dict[str, dict[str, float]] = Field(
        default={}, description="A/B: a name that clients ask for, and the weights of the models behind it"
    )
    log_file: OutputPath | None = Field(default=None, description="JSON log of requests; default: the process' stderr")
    log_text: bool = Field(default=False, description="Write prompts and answers to that log")
    record: RecordConfig = Field(default=RecordConfig(), description="Requests kept for replay and A/B reports")
    rag: RagConfig = Field(default=RagConfig(), description="Answers from documents")

    @model_validator(mode="after")
    def _weights(self) -> "GatewayConfig":
        for name, weights in self.routes.items():
            if not weights or any(weight < 0 for weight in weights.values()) or not sum(weights.values()):
                raise ValueError(f"routes.{name}: give weights that are not negative and not all zero")
            if nested := weights.keys() & self.routes.keys():
                raise ValueError(f"routes.{name}: {', '.join(sorted(nested))} is a route itself: name models")
        return self

    def metrics_folder(self) -> Path:
        """A new folder in which several replicas add their metrics up."""
        return Path(tempfile.mkdtemp(prefix="workbench-metrics-"))

    def policy(self, model: str) -> ModelPolicy:
        """The policy of ``model``."""
        return self.models.get(model, self.defaults)
