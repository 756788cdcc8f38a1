"""``workbench GROUP COMMAND [CONFIG.yaml] [key=value ...]``: the composition root.

This is the only module of ``workbench`` that looks upward. The commands of a run are named, and imported when called;
what is imported here is light, so that ``--help`` needs neither torch nor ray.
"""

import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer._click import Context, HelpFormatter  # typer carries its own click
from typer._click.exceptions import ClickException

from cluster import cluster_cli, jobs_cli, runs_remote_cli
from cluster.nodes import Node
from cluster.placement import place
from serve.gateway import keys_cli
from tune import tune_cli
from workbench.commands import Command, execute, parse_arguments, show_plan
from workbench.config import CHECKOUT, Config, load
from workbench.cost import cards_of
from workbench.errors import Failure, UserError
from workbench.interpreter import leave_spaces_behind
from workbench.redact import redact
from workbench.reproduce import reproduce_command
from workbench.resources import Placed
from workbench.runs_cli import runs_app

MEASURED = "all its figures are measured; run the command again and compare the two with 'workbench runs compare'"
OF_A_MOMENT = "it tells of the state that it met, which is gone"

GROUPS: dict[str, tuple[str, dict[str, Command]]] = {
    "data": (
        "Documents: audit, filter, embed, search, bench.",
        {
            "audit": Command(
                "data_pipelines.audit", "Count, measure and screen a set of documents.", dashboard=False, gates=True
            ),
            "filter": Command("data_pipelines.filter", "Make the clean set of an audit, by rules.", ray=False),
            "compare": Command("data_pipelines.compare", "Tell what changed between two audits.", ray=False),
            "embed": Command(
                "data_pipelines.embed",
                "Embed documents into Milvus; restarts where it died.",
                dashboard=False,
                varies=("embedded", "already_there", "deleted"),
            ),
            "search": Command(
                "data_pipelines.search", "Search a collection by meaning.", positional="query", ray=False
            ),
            "bench": Command(
                "data_pipelines.bench", "Measure a Milvus: recall against latency, by index.", ray=False, once=MEASURED
            ),
        },
    ),
    "train": (
        "Models: pretrain, fine-tune, evaluate, export.",
        {
            "pretrain": Command("workloads.pretrain", "Train a small decoder-only model from scratch.", plans=True),
            "scaling": Command("workloads.scaling", "Train a ladder of sizes and fit the law by which loss falls."),
            "sft": Command(
                "workloads.sft", "Fine-tune on instructions: full, LoRA or QLoRA, sharded by FSDP2.", plans=True
            ),
            "dpo": Command(
                "workloads.dpo", "Tune on preference pairs; the base, its adapter off, is the reference.", plans=True
            ),
            "eval": Command("workloads.evaluate", "Compare a base model and its adapter on held-out instructions."),
            "export": Command(
                "workloads.export", "Write what was trained as a folder with a model card.", positional="run", ray=False
            ),
        },
    ),
    "tune": (
        "Sweeps over workloads.",
        {"run": Command("tune.sweep", "Run a sweep of a workload over a search space.", plans=True)},
    ),
    "serve": (
        "Models behind OpenAI-compatible endpoints.",
        {
            "plan": Command(
                "serve.plan", "Size a model and tell what fits where, in which split.", positional="source", ray=False
            ),
            "up": Command(
                "serve.up",
                "Deploy models with vLLM under Ray Serve and wait for a real completion.",
                once="it made a server, not figures; start one with 'workbench serve up' and the run's config.yaml",
            ),
            "status": Command(
                "serve.status", "Show what is deployed and whether it answers.", ray=False, once=OF_A_MOMENT
            ),
            "logs": Command(
                "serve.logs", "Print what the engines wrote.", positional="model", ray=False, once=OF_A_MOMENT
            ),
            "down": Command("serve.down", "Take the deployment down.", ray=False, once=OF_A_MOMENT),
            "ask": Command(
                "serve.ask", "Answer a question from the documents, with sources.", positional="question", ray=False
            ),
            "gateway": Command(
                "serve.gateway.standalone",
                "Stand before OpenAI-compatible servers that run already.",
                ray=False,
                once="it made a server, not figures",
            ),
            "observe": Command(
                "serve.observe", "Write Prometheus' configuration and alerts, and a Grafana dashboard.", ray=False
            ),
            "replay": Command(
                "serve.replay", "Send recorded requests again and compare the answers.", ray=False, once=MEASURED
            ),
            "ab-report": Command("serve.ab_report", "Compare the models behind an A/B route.", ray=False),
            "rag-eval": Command(
                "serve.rag_eval", "Judge answers over documents by a file of questions.", ray=False, once=MEASURED
            ),
            "loadtest": Command(
                "serve.loadtest", "Measure throughput, time to first token and latency.", ray=False, once=MEASURED
            ),
            "trace": Command(
                "serve.trace", "Trace some seconds of a serving engine.", positional="model", ray=False, once=MEASURED
            ),
            "compare": Command("serve.compare", "Set two load tests beside each other.", positional="runs", ray=False),
        },
    ),
    "profile": (
        "Where the time and the bytes went.",
        {
            "record": Command(
                "profiling.record", "Sample every host until stopped: CPU, memory, disk, network, GPU.", once=MEASURED
            ),
            "pcie": Command(
                "profiling.pcie", "Measure what links and memories carry, and check every copy.", once=MEASURED
            ),
            "collectives": Command(
                "profiling.collectives", "Measure all-reduce and others between workers, by size.", once=MEASURED
            ),
            "roofline": Command(
                "profiling.roofline", "Draw a model under the limits of a device, measured.", once=MEASURED
            ),
            "export": Command(
                "profiling.export", "Write Prometheus' config, alert rules and a Grafana dashboard.", ray=False
            ),
            "trace": Command(
                "profiling.trace_report", "Summarise torch.profiler's traces of a training run's steps.", ray=False
            ),
            "flame": Command("profiling.flame", "Draw where an actor's Python time goes, by py-spy.", once=MEASURED),
            "report": Command(
                "profiling.report", "Draw a recording: findings, timelines, shares, comparison.", ray=False
            ),
        },
    ),
}

NEXT_LINES = """
next, for example:
  .venv/bin/workbench data search configs/demo/search.yaml "how do I limit the memory of a dataset"
  .venv/bin/workbench runs list
  .venv/bin/workbench serve up configs/demo/serve.yaml
  .venv/bin/workbench cluster local          (then, in another terminal:)
  .venv/bin/workbench submit -- data audit configs/demo/audit.yaml"""

RECORDER = "profiling.recorder"
"""What ``--profile`` samples the hosts with."""

app = typer.Typer(
    name="workbench",
    help="A Ray-based research cluster workbench: audit, embed, fine-tune, sweep, serve and profile.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _add_group(group: str, help_text: str, commands: dict[str, Command]) -> typer.Typer:
    group_app = typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode=None)
    for name, command in commands.items():
        _add_command(group_app, group, name, command)
    app.add_typer(group_app, name=group)
    return group_app


def _add_command(group_app: typer.Typer, group: str, name: str, command: Command) -> None:
    text = f"[{command.positional.upper()}] " if command.positional else ""

    @group_app.command(name, help=command.help, cls=_with_keys(command))
    def call(
        arguments: Annotated[
            list[str] | None, typer.Argument(metavar=f"{text}[CONFIG.yaml] [KEY=VALUE]...", show_default=False)
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, nothing else.")] = False,
        name_: Annotated[str, typer.Option("--name", help="A label for the run folder.")] = "",
        profile: Annotated[bool, typer.Option("--profile", help="Sample the hosts while it runs.")] = False,
        fail_on: Annotated[
            list[str] | None,
            typer.Option(metavar="'NAME>NUMBER'", hidden=not command.gates, help="Exit code 1 where it holds."),
        ] = None,
        plan: Annotated[
            bool,
            typer.Option(
                "--plan", "--dry-run", hidden=not command.plans, help="Estimate the memory it needs; do not run."
            ),
        ] = False,
    ) -> None:
        if plan:
            show_plan(command, arguments or [], as_json)
            return
        recorder = RECORDER if profile else ""
        gates = [f"fail_on={json.dumps(fail_on)}"] if fail_on else []
        execute(group, name, command, [*(arguments or []), *gates], run_name=name_, as_json=as_json, recorder=recorder)


def _with_keys(command: Command) -> type[typer.core.TyperCommand]:
    class WithKeys(typer.core.TyperCommand):
        """A command whose ``--help`` also lists the keys of its config."""

        def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
            rows = []
            for key, field in command.schema().model_fields.items():
                default = (
                    "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
                )
                rows.append((key, f"{field.description or ''} [{default}]".strip()))
            if rows:
                with formatter.section("Config keys"):
                    formatter.write_dl(rows)

    return WithKeys


_apps = {group: _add_group(group, help_text, commands) for group, (help_text, commands) in GROUPS.items()}
tune_cli.add_to(_apps["tune"])
_apps["serve"].add_typer(keys_cli.keys_app, name="keys")


@app.command()
def demo(
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every stage again.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of training, sweep and evaluation.")] = 17,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, nothing else.")] = False,
) -> None:
    """Run the main job end to end on this machine: audit, embed, train, sweep, evaluate, serve, profile."""
    command = Command("cluster.demo", "", ray=False)
    overrides = [f"fresh={str(fresh).lower()}", f"seed={seed}"]
    execute("workbench", "demo", command, overrides, run_name="", as_json=as_json)
    print(NEXT_LINES, file=sys.stderr)


def _command(line: Sequence[str]) -> Command | None:
    """The command that a line begins with, or None for one that has no config."""
    return GROUPS.get(line[0], ("", {}))[1].get(line[1]) if len(line) > 1 else None


def _parsed(line: Sequence[str]) -> tuple[Any, Config] | None:
    """The module and the config of a command line, or None for one that has no config; its inputs are not visited."""
    command = _command(line)
    if command is None:
        return None
    words = iter(line[2:])
    arguments = []
    for word in words:
        if word in ("--name", "--fail-on"):
            next(words, "")
        elif not word.startswith("--"):
            arguments.append(word)
    file, overrides = parse_arguments(command, arguments)
    if file is not None and file.is_absolute() and not file.exists():
        return None  # it lies on the cluster
    file = CHECKOUT / file if file else None
    return importlib.import_module(command.module), load(command.schema(), file, overrides, visit_paths=False)


def _takes_resources(line: Sequence[str]) -> bool:
    command = _command(line)
    return command is not None and "resources" in command.schema().model_fields


def _places(line: Sequence[str], nodes: Sequence[Node]) -> list[str]:
    """What the workers of a command line must wait for. Raises UserError for what no host can ever give them."""
    parsed = _parsed(line)
    if parsed is None:
        return []
    module, config = parsed
    if hasattr(module, "places"):
        return [placement.waits for placement in module.places(config, nodes) if placement.waits]
    if isinstance(config, Placed):
        waits = place(config.request(), nodes, workers=getattr(config, "workers", 1)).waits
        return [waits] if waits else []
    return []


def _requests(line: Sequence[str]) -> str:
    """What the workers of a command line ask for, in words."""
    parsed = _parsed(line)
    if parsed is None or not isinstance(parsed[1], Placed):
        return ""
    workers = getattr(parsed[1], "workers", 1)
    return (f"{workers} x " if workers > 1 else "") + f"({parsed[1].request()})"


def _cards(line: Sequence[str]) -> float:
    """How many cards the workers of a command line ask for together."""
    parsed = _parsed(line)
    return cards_of(parsed[1].model_dump(mode="json")) if parsed is not None else 0.0


app.command()(jobs_cli.submit_command(jobs_cli.CommandFacts(_takes_resources, _places, _requests, _cards)))
app.add_typer(jobs_cli.jobs_app, name="jobs")
app.add_typer(cluster_cli.cluster_app, name="cluster")
runs_app.command("list")(runs_remote_cli.list_runs)
runs_app.command("pull")(runs_remote_cli.pull)
runs_app.command("reproduce")(reproduce_command(_command))
runs_app.command("send", hidden=True)(runs_remote_cli.send)
app.add_typer(runs_app, name="runs")


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit code 0, 1 for a failure, 2 for the user's mistake, 130 when interrupted."""
    if argv is None:
        leave_spaces_behind()
    try:
        result: Any = app(args=argv, prog_name="workbench", standalone_mode=False)  # also as python -m workbench
    except typer.Abort:
        sys.exit(130)
    except ClickException as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except Failure as error:
        print(f"failed: {redact(str(error))}", file=sys.stderr)
        sys.exit(Failure.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        print(redact("".join(traceback.format_exception(error)[-3:])), file=sys.stderr)
        print(f"failed: {type(error).__name__}: {redact(str(error))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(result if isinstance(result, int) else 0)
