"""The line to each model: its engine and what guards it."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from serve.gateway.admission import Admission
from serve.gateway.breaker import Breaker
from serve.gateway.cost import Meter
from serve.gateway.engines import Engine, HttpEngine
from serve.gateway.errors import model_unknown
from serve.gateway.metrics import Metrics
from serve.gateway.settings import GatewayConfig

LIST_SECONDS = 10.0
"""The list of the engines' models is asked for again after this."""


class Line:
    """One model. An adapter shares the places, the breaker and the meter of ``base``, whose engine answers for it."""

    def __init__(
        self, model: str, engine: Engine, settings: GatewayConfig, metrics: Metrics, base: "Line | None" = None
    ) -> None:
        self.model = model
        self.engine = engine
        self.policy = settings.policy(model)
        if base is None:
            self.admission = Admission(model, self.policy, settings.replicas, metrics.places(model))
            self.breaker = Breaker(model, self.policy, metrics.breaker(model))
            self.meter = Meter()
        else:
            self.admission, self.breaker, self.meter = base.admission, base.breaker, base.meter

    @property
    def name_there(self) -> str:
        """What the engine calls the model."""
        return self.engine.model_there if isinstance(self.engine, HttpEngine) else self.model


class Lines:
    """All models: those of the engines under the gateway, and those of other servers.

    ``base`` gives the name of the engine's own model for each adapter.
    """

    def __init__(
        self, settings: GatewayConfig, inside: Engine | None, base: Mapping[str, str], metrics: Metrics
    ) -> None:
        self._settings = settings
        self._inside = inside
        self._base = base
        self._metrics = metrics
        self._lines = {
            name: Line(name, HttpEngine(name, up), settings, metrics) for name, up in settings.upstreams.items()
        }
        self._cards: dict[str, dict[str, Any]] = {}
        self._asked_at = -LIST_SECONDS
        self._asking = asyncio.Lock()

    async def cards(self, fresh: bool = False) -> dict[str, dict[str, Any]]:
        """Every model in OpenAI's form, by name; a route is a model too."""
        async with self._asking:
            if fresh or time.monotonic() - self._asked_at > LIST_SECONDS:
                inside = await self._inside.models() if self._inside else []
                outside = [
                    card for name in self._settings.upstreams for card in await self._lines[name].engine.models()
                ]
                self._cards = {card["id"]: card for card in [*inside, *outside]}
                self._asked_at = time.monotonic()
        routes = {name: {"id": name, "object": "model", "created": 0, "owned_by": "route"} for name in
                  self._settings.routes}  # fmt: skip
        return {**self._cards, **routes}

    async def line(self, model: str) -> Line:
        """The line to ``model``. Raises ApiError 404 where there is none."""
        if model not in self._lines:
            if self._inside is None or model not in await self.cards():
                raise model_unknown(model)
            self._open(model, self._inside)
        return self._lines[model]

    def _open(self, model: str, inside: Engine) -> Line:
        if model not in self._lines:
            name = self._base.get(model, model)
            base = self._open(name, inside) if name != model else None
            self._lines[model] = Line(model, inside, self._settings, self._metrics, base)
        return self._lines[model]
