"""What a worker asks for, in the terms a person uses: the ``resources:`` key of every command that places work.

    resources: {gpu: rtx-pro-6000}             # that card and no other
    resources: {gpu: {memory: ">=24GB"}}       # any card of that size
    resources: {gpu: any, share: 0.5}          # half of a plain card; nobody shares who does not ask
    resources: {gpus: all on system-a}         # every card of one host
    resources: {mps: 1}                        # the Mac's own GPU
    resources: {cpu: 2, host: linux-box}       # CPUs, there
    resources: cpu only

``cluster/placement.py`` turns a request into what Ray understands.
"""

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from workbench.config import Config
from workbench.errors import UserError

MODEL = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
MEMORY = re.compile(r">=\s*([0-9]+(?:\.[0-9]+)?)\s*GB")
ALL_ON = re.compile(r"all on ([a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?)")
CPU_ONLY = "cpu only"
EXAMPLES = 'rtx-5090, any, or {memory: ">=24GB"}'


def _model(text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError(f"a card's model is a text: {EXAMPLES}")
    if text and not MODEL.fullmatch(text):
        slug = "-".join(re.findall(r"[a-z0-9]+", text.lower()))
        raise ValueError(f"write a card's model in lower case with hyphens: did you mean {slug or 'rtx-5090'}?")
    return text


def _memory(text: Any) -> Any:
    if not isinstance(text, str) or (text and not MEMORY.fullmatch(text)):
        number = re.search(r"[0-9]+(\.[0-9]+)?", str(text))
        raise ValueError(f'memory is a least size: write ">={number[0] if number else 24}GB"')
    return text


class CardNeed(Config):
    """One card: of a model, of a least size, or any plain one."""

    model: Annotated[str, BeforeValidator(_model)] = Field(default="", description="as people say it: rtx-pro-6000")
    memory: Annotated[str, BeforeValidator(_memory)] = Field(default="", description='on the box: ">=24GB"')

    @property
    def memory_gb(self) -> float:
        """The least memory in GB, 0 where any will do."""
        found = MEMORY.fullmatch(self.memory)
        return float(found[1]) if found else 0.0

    def __str__(self) -> str:
        return " ".join(filter(None, [self.model or "any card", f"with {self.memory}" if self.memory else ""]))


def _card_need(value: Any) -> Any:
    if isinstance(value, str):
        return {} if value == "any" else {"model": value}
    if value is None or isinstance(value, dict | CardNeed):
        return value
    raise ValueError(f"say which card: {EXAMPLES}")


def _gpus(value: Any) -> Any:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and ALL_ON.fullmatch(value):
        return value
    raise ValueError("write 'all on HOST', or a number of plain cards of one host")


def _cpu(value: Any) -> Any:
    if value == "only":
        raise ValueError("write 'resources: cpu only', or {cpu: 2}")
    return value


class ResourceRequest(Config):
    """What one worker (a task, an actor, a trial, an engine, a job's own process) gets."""

    gpu: Annotated[CardNeed | None, BeforeValidator(_card_need)] = Field(
        default=None, description=f"one card: {EXAMPLES}"
    )
    gpus: Annotated[int | str | None, BeforeValidator(_gpus)] = Field(
        default=None, description="several: 'all on HOST', or a number of plain cards of one host"
    )
    mps: Literal[0, 1] = Field(default=0, description="1: an Apple GPU")
    cpu: Annotated[float | None, BeforeValidator(_cpu)] = Field(
        default=None, ge=0, description="CPUs; alone: no card at all"
    )
    share: float | None = Field(default=None, gt=0, lt=1, description="of the card, to let others have the rest")
    host: str = Field(default="", pattern=r"^([a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?)?$", description="only there")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if value == CPU_ONLY:
            return {}
        if isinstance(value, str):
            raise ValueError(f"'{value}' is no request: write cpu only, or keys such as gpu: rtx-5090")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "ResourceRequest":
        given = {"gpu": self.gpu is not None, "gpus": self.gpus is not None, "mps": self.mps > 0}
        kinds = [name for name, asked in given.items() if asked]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} cannot be had together: ask for one of them")
        if self.share is not None and self.gpu is None:
            raise ValueError("share is of one card: give gpu too, for example {gpu: any, share: 0.5}")
        if self.host and self.all_on and self.host != self.all_on:
            raise ValueError(f"gpus: {self.gpus} and host: {self.host} name two hosts")
        return self

    @property
    def all_on(self) -> str:
        """The host whose every card is asked for, or empty."""
        found = ALL_ON.fullmatch(self.gpus) if isinstance(self.gpus, str) else None
        return found[1] if found else ""

    @property
    def device(self) -> Literal["cuda", "mps", "cpu"]:
        """What a worker computes on."""
        if self.gpu is not None or self.gpus is not None:
            return "cuda"
        return "mps" if self.mps else "cpu"

    @property
    def gpu_share(self) -> float:
        """Cards of one worker: 0 for none, a fraction where it shares; every card of "all on" counts as one."""
        if self.gpu is not None:
            return self.share or 1.0
        if self.gpus is not None:
            return float(self.gpus) if isinstance(self.gpus, int) else 1.0
        return 0.0

    def __str__(self) -> str:
        parts = []
        if self.gpu is not None:
            parts.append((f"{self.share:g} of " if self.share else "") + str(self.gpu))
        if self.gpus is not None:
            parts.append(f"{self.gpus} cards" if isinstance(self.gpus, int) else f"all cards on {self.all_on}")
        if self.mps:
            parts.append("an Apple GPU")
        if self.cpu is not None or not parts:
            parts.append(f"{self.cpu:g} CPU" if self.cpu is not None else CPU_ONLY)
        return " and ".join(parts) + (f" on {self.host}" if self.host else "")


class Placed(Config):
    """Base of a config whose workers are placed: ``resources`` beside the plain amounts of CPU and GPU.

    ``resources`` says which card a worker gets, and wins; the amounts are then set from it, so that the resolved
    config shows both alike.
    """

    amounts: ClassVar[tuple[str, str]] = ("cpus_per_worker", "gpus_per_worker")
    """The names of the config's keys for CPUs and for GPUs; an empty name for none."""
    several: ClassVar[bool] = False
    """Whether ``gpus`` makes sense: a worker, or a group of them, that takes more than one card."""

    resources: ResourceRequest | None = Field(
        default=None, description='what a worker gets: {gpu: rtx-5090}, {gpu: {memory: ">=24GB"}}, cpu only, ...'
    )

    @model_validator(mode="after")
    def _amounts_of_the_request(self) -> "Placed":
        self._take_amounts()
        return self

    def _take_amounts(self) -> None:
        if self.resources is None:
            return
        if self.resources.gpus is not None and not self.several:
            raise ValueError("a worker of this command takes one card: give resources.gpu")
        cpus, gpus = self.amounts
        if not gpus and self.resources.device != "cpu":
            raise ValueError(f"this command computes on CPUs: {self.resources} would lie idle")
        given = getattr(self, gpus) if gpus and gpus in self.model_fields_set else 0
        if given and not math.isclose(given, self.resources.gpu_share):
            raise ValueError(f"{gpus} {given:g} contradicts resources ({self.resources}): leave {gpus} out")
        if gpus:
            self.__dict__[gpus] = self.resources.gpu_share
        if cpus and self.resources.cpu is not None:
            if not self.resources.cpu:
                raise ValueError(f"a worker needs CPUs: give resources.cpu above 0, or leave it to {cpus}")
            self.__dict__[cpus] = self.resources.cpu

    def asking_for(self, resources: ResourceRequest) -> Self:
        """A copy whose workers get ``resources``. Raises ValueError where the config contradicts them."""
        copy = self.model_copy(update={"resources": resources})
        copy._take_amounts()
        return copy

    def request(self) -> ResourceRequest:
        """What one worker asks for: ``resources`` with the CPUs filled in, or the amounts in its terms."""
        cpus, gpus = self.amounts
        cpu = float(getattr(self, cpus)) if cpus else None
        if self.resources is not None:
            return self.resources.model_copy(update={"cpu": cpu if self.resources.cpu is None else self.resources.cpu})
        gpu = float(getattr(self, gpus)) if gpus else 0.0
        return plain_request(cpu, gpu)


def plain_request(cpus: float | None, gpus: float) -> ResourceRequest:
    """The request for an amount of CPUs and of plain cards. Raises UserError for one and a half cards."""
    if not gpus:
        return ResourceRequest(cpu=cpus)
    if gpus <= 1:
        return ResourceRequest(cpu=cpus, gpu=CardNeed(), share=gpus if gpus < 1 else None)
    if gpus != int(gpus):
        raise UserError(f"{gpus:g} cards: a worker gets a share of one card, or whole cards")
    return ResourceRequest(cpu=cpus, gpus=int(gpus))
