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
from serve.gateway.settings import GatewayConfig

LIST_SECONDS = 10.0
"""The list of the engines' models is asked for again after this."""


class Line:
    """One model. An adapter shares the places, the breaker and the meter of ``base``, whose engine answers for it."""

    def __init__(self, model: str, engine: Engine, settings: GatewayConfig, base: "Line | None" = None) -> None:
        self.model = model
        self.engine = engine
        self.policy = settings.policy(model)
        self.admission: Admission = base.admission if base else Admission(model, self.policy, settings.replicas)
        self.breaker: Breaker = base.breaker if base else Breaker(model, self.policy)
        self.meter: Meter = base.meter if base else Meter()

    @property
    def name_there(self) -> str:
        """What the engine calls the model."""
        return self.engine.model_there if isinstance(self.engine, HttpEngine) else self.model


class Lines:
    """All models: those of the engines under the gateway, and those of other servers.

    ``base`` gives the name of the engine's own model for each adapter.
    """

    def __init__(self, settings: GatewayConfig, inside: Engine | None, base: Mapping[str, str]) -> None:
        self._settings = settings
        self._inside = inside
        self._base = base
        self._lines = {name: Line(name, HttpEngine(name, up), settings) for name, up in settings.upstreams.items()}
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
            base = self._base.get(model, model)
            self._lines[model] = Line(
                model, inside, self._settings, self._open(base, inside) if base != model else None
            )
        return self._lines[model]

    def open_lines(self) -> list[Line]:
        """The lines that have been used, and those to other servers."""
        return list(self._lines.values())
