"""Deploy models with vLLM under Ray Serve and wait until each has answered a real request over HTTP.

    workbench serve up configs/demo/serve.yaml

On a cluster the application stays when the command ends (``serve down`` takes it away). With a Ray of the command's
own nothing would keep it alive, so the command stays in the foreground until Ctrl-C and then takes all down.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator

from cluster.nodes import Node, member_nodes
from cluster.placement import ENOUGH, Placement
from serve.application import Deployed, address, causes, deploy, deployed, engine_log, remove, start_proxy
from serve.availability import available
from serve.engine import EnginePlace, check_engine_arguments, engine_place, served
from serve.fits import Checked, check_fit
from serve.gateway.checks import check_settings
from serve.gateway.own_key import own_key
from serve.gateway.settings import GatewayConfig
from serve.keys import default_key_file, make_key
from serve.model_config import ModelConfig, Role
from workbench.config import Config, OutputPath
from workbench.errors import Failure, UserError
from workbench.files import write_atomic
from workbench.runs import Run, Summary

INGRESS_CPUS = 0.1
"""The ingress parses and forwards; it must fit beside the engines on two cores."""


class ServeConfig(Config):
    """What to serve, where."""

    models: list[ModelConfig] = Field(min_length=1, description="Models, each behind its own name")
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 opens it to the network")
    port: int = Field(default=8000, ge=1, le=65535, description="Port to listen on")
    route_prefix: str = Field(default="/", pattern=r"^/([\w-]+)?$", description="Path before /v1")
    api_key_file: OutputPath | None = Field(
        default=None, description="File of the API key, made if absent; default RUNS/.secrets/serve_key"
    )
    gateway: GatewayConfig = Field(default=GatewayConfig(), description="Limits, fallbacks, A/B routes, records: docs")
    timeout: float = Field(default=900.0, gt=0, description="Seconds until every model must have answered")
    replace: bool = Field(
        default=False, description="Change what 'serve up' deployed before; models that stay the same keep running"
    )
    block: bool | None = Field(default=None, description="Stay in the foreground; default: only with a Ray of our own")

    @field_validator("models")
    @classmethod
    def _distinct_names(cls, models: list[ModelConfig]) -> list[ModelConfig]:
        names = [name for model in models for name in (model.name, *model.adapters)]
        if len(set(names)) < len(names):
            raise ValueError(f"two models have one name: {', '.join(names)}")
        return models


def check(config: ServeConfig) -> None:
    """Raise UserError where vLLM is not installed or does not know an argument, or the gateway names what is not
    there."""
    if (reason := available()) is not None:
        raise UserError(reason)
    check_engine_arguments(config.models)
    check_settings(config.gateway, [name for model in config.models for name in (model.name, *model.adapters)])


def run(config: ServeConfig, run: Run) -> Summary:
    """Deploy, wait for a completion of every model, and stay or leave.

    Raises UserError for what can be seen before, Failure when a model does not come up.
    """
    check(config)
    begun = time.monotonic()
    key_file = config.api_key_file or default_key_file()
    key = make_key(key_file)
    asyncio.run(own_key(config.gateway, key))
    before, nodes = deployed(), member_nodes()
    # What runs holds what it will go on holding: a model that stays must find its old place.
    places = _places(config.models, [replace(node, free=None) for node in nodes] if before else nodes)
    if before and not config.replace:
        raise UserError(
            f"already up with {', '.join(before.models())}: run 'workbench serve down', or give replace=true"
        )
    checked = {
        model.name: check_fit(model, places[model.name].placement, nodes, places[model.name].device, run.say)
        for model in config.models
    }

    from serve.ingress import build_application

    if before and address() != (config.host, config.port):
        run.say("taking down what was served before: a running Serve cannot listen elsewhere")
        remove()
        before = None
    if before:
        gone = before.models().keys() - {model.name for model in config.models}
        run.say(f"changing what is served: {', '.join(before.models())}" + "".join(f"; {name} ends" for name in gone))
    run.say(
        f"starting {len(config.models)} engines: "
        + ", ".join(f"{m.name} ({places[m.name].placement.host or places[m.name].device})" for m in config.models)
    )
    for place in places.values():
        if place.placement.waits:
            run.say(place.placement.waits)
    for model in config.models:
        run.input(f"model {model.name}", source=model.source)
    base_url = f"http://{config.host}:{config.port}{config.route_prefix.rstrip('/')}/v1"
    try:
        start_proxy(config.host, config.port)
        _quiet()
        models = [served(model, places[model.name], checked[model.name].layers) for model in config.models]
        deploy(build_application(models, config.gateway, INGRESS_CPUS), config.route_prefix)
        _quiet()  # again: building has imported more that sets up logging
        deadline = begun + config.timeout
        _wait_running(run, deadline)
        answers = {
            name: first_answer(base_url, key, name, model.role, deadline)
            for model in config.models
            for name in (model.name, *model.adapters)
        }
    except BaseException:
        if before is None:  # else what still answers goes on
            remove()
        raise
    ready_s = time.monotonic() - begun
    run.say(f"up after {ready_s:.0f} s: {base_url}  (key in {key_file})")
    _report(run, config, base_url, answers, checked)
    if config.block if config.block is not None else run.owns_ray:
        _stay(run)
    return {
        "url": base_url,
        "models": ", ".join(model.name for model in config.models),
        "key_file": str(key_file),
        "ready_s": round(ready_s, 1),
        **{f"first_completion_{name}_s": round(seconds, 3) for name, seconds in answers.items()},
    }


def _quiet() -> None:
    """Keep Serve's and the HTTP client's notes of every step off the terminal; ``run.say`` tells what matters."""
    for name in ("ray.serve", "ray.llm", "httpx", "httpx2", "vllm"):
        logging.getLogger(name).setLevel(logging.WARNING)


def places(config: ServeConfig, nodes: Sequence[Node]) -> list[Placement]:
    """Where the models would run. Raises UserError for models that the cluster can never hold all together."""
    return [place.placement for place in _places(config.models, nodes).values()]


def _places(models: list[ModelConfig], nodes: Sequence[Node]) -> dict[str, EnginePlace]:
    """Where each model runs. Raises UserError for models that the cluster can never hold all together."""
    chosen = {model.name: engine_place(model, nodes) for model in models}
    asked: Counter[str] = Counter({"CPU": INGRESS_CPUS})
    for model in models:
        for bundle in chosen[model.name].bundles * copies(model, chosen[model.name]):
            asked.update(bundle)
    for resource, amount in asked.items():
        there = sum(node.total.get(resource, 0.0) for node in nodes)
        if amount > there + ENOUGH:
            raise UserError(
                f"the models ask for {amount:g} {resource}, the cluster has {there:g}: "
                "lower replicas, cpus or gpus of the models, or add machines"
            )
    return chosen


def copies(model: ModelConfig, place: EnginePlace) -> int:
    """Replicas that must find room at once: those of each data-parallel rank, unless one replica holds all ranks."""
    return model.least_replicas * (1 if place.inside else model.data)


def _wait_running(run: Run, deadline: float) -> None:
    """Return when every replica runs. Raises Failure with the engine's last lines when one cannot start."""
    shown = ""
    seen: dict[str, str] = {}  # kept, for Serve forgets a replica that died before it counts it as dead
    while time.monotonic() < deadline:
        application = deployed()
        if application is not None:
            if application.status == "RUNNING":
                return
            seen |= application.engine_workers()
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise Failure(f"an engine did not start: {_reason(run, application, seen)}")
            text = ", ".join(f"{name} {_state(d)}" for name, d in application.models().items())
            if text != shown:
                run.say(f"engines: {text}")
                shown = text
        time.sleep(0.5)
    raise Failure(f"not up within the timeout ({shown}): {_reason(run, deployed(), seen)}")


def _state(deployment: dict[str, Any]) -> str:
    states = [str(getattr(r["state"], "value", r["state"])).lower() for r in deployment["replicas"]]
    return "/".join(sorted(set(states))) or "waiting for resources"


def _reason(run: Run, application: Deployed | None, seen: dict[str, str]) -> str:
    """Why it did not come up: the exceptions that the engine's log names, and where the whole log is."""
    if application is None:
        return "the application is gone"
    told = "\n".join([application.message, *(d["message"] for d in application.deployments.values())])
    log = engine_log(seen)
    write_atomic(run.artifact("engine.log"), f"{told}\n\n{log}")
    named = causes(log) or causes(told) or told.strip().splitlines()[-1:]
    return "; ".join(named) + f"\nthe engine's log: {run.artifact('engine.log')}"


def first_answer(base_url: str, key: str, model: str, role: Role, deadline: float) -> float:
    """Seconds of a real request through the HTTP endpoint: a completion of one token, or the vector of a word.

    Raises Failure with the server's answer if there is none until the deadline.
    """
    import openai

    said = "no answer"
    with openai.OpenAI(base_url=base_url, api_key=key, timeout=60, max_retries=0) as client:
        while time.monotonic() < deadline:
            begun = time.monotonic()
            try:
                if role == "embedding":
                    client.embeddings.create(model=model, input="The")
                else:
                    client.completions.create(model=model, prompt="The", max_tokens=1, temperature=0)
                return time.monotonic() - begun
            except openai.APIStatusError as error:
                if error.status_code not in (404, 503):  # the proxy does not know the route yet
                    raise Failure(f"model '{model}' answered {error.status_code}: {error.message}") from None
                said = str(error)
            except openai.APIConnectionError as error:
                said = str(error.__cause__ or error)
            time.sleep(0.5)
    raise Failure(f"model '{model}' gave no answer at {base_url}: {said}")


def _report(
    run: Run, config: ServeConfig, base_url: str, answers: dict[str, float], checked: dict[str, Checked]
) -> None:
    run.report.text("Endpoint", f"{base_url}, OpenAI-compatible, with an API key.")
    rows = [
        {
            "model": model.name,
            "role": model.role,
            "source": model.source,
            "adapters": ", ".join(model.adapters),
            "replicas": model.replicas,
            "first answer (s)": answers[model.name],
        }
        for model in config.models
    ]
    run.report.table("Models", rows)
    ranks = [
        {"model": name, "card": rank.card.name, "weights": rank.weights + rank.scales, "for KV cache": rank.spare,
         "experts a layer": rank.experts}
        for name, each in checked.items() if each.fit for rank in each.fit.ranks
    ]  # fmt: skip
    if ranks:
        run.report.table("Bytes of each rank", ranks, note="An estimate, of one replica.")


def _stay(run: Run) -> None:
    """Hold the foreground until Ctrl-C or SIGTERM, then take the application down."""
    run.say("serving in the foreground; Ctrl-C takes it down")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        run.say("taking down")  # the ordinary end of a foreground server, not an interrupted run
    finally:
        remove()
