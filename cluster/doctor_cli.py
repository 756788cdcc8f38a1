"""``workbench cluster init`` and ``workbench cluster doctor``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.inventory import DEFAULT_FILE
from workbench.errors import UserError
from workbench.files import write_atomic

InventoryFile = Annotated[
    Path | None,
    typer.Option("--inventory", help="The inventory; cluster.yaml, or the last one brought up.", metavar="FILE"),
]


def init(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[HOST]... [FILE]", help="With --discover: [user@]host[:port]. FILE ends in .yaml."),
    ] = None,
    discover: Annotated[
        bool, typer.Option("--discover", help="Ask the HOSTs over ssh; the first is the head.")
    ] = False,
    storage: Annotated[str, typer.Option(help="What they share: a path or s3://...", show_default=False)] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write an annotated cluster.yaml: for three example machines, or from what yours report over ssh."""
    from cluster.discover import discover as ask
    from cluster.discover import notes
    from cluster.inventory import inventory_of
    from cluster.inventory_file import annotated, three_machines

    hosts, file = _split(arguments or [])
    if hosts and not discover:
        raise UserError(f"{' '.join(hosts)}: to ask hosts, type: workbench cluster init --discover {' '.join(hosts)}")
    if discover and not hosts:
        raise UserError("--discover asks hosts: name them, for example: workbench cluster init --discover ada@10.0.0.2")
    if file.is_dir():
        raise UserError(f"{file} is a folder: name a file")
    if file.exists() and not force:
        raise UserError(f"{file} exists and is kept: name another file, or overwrite it with --force")
    if discover:
        inventory, found = ask(hosts, storage)
        text = annotated(inventory, file=str(file), notes=notes(inventory, found))
    else:
        import getpass

        inventory = three_machines(getpass.getuser())
        if storage:
            inventory = inventory_of(inventory.model_dump(exclude_unset=True) | {"storage": storage})
        text = annotated(inventory, file=str(file))
    try:
        write_atomic(file, text)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    given = "" if file == DEFAULT_FILE else f" --inventory {file}"
    print(f"{file}: {len(inventory.hosts)} hosts, head {inventory.head}, storage {inventory.storage}")
    print(f"next: look through it, then: workbench cluster doctor{given}", file=sys.stderr)


def doctor(
    inventory: InventoryFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> int:
    """Examine every host over ssh and say what to type; changes nothing. Exit code 1 if a check failed."""
    from cluster.client_state import inventory_in_use
    from cluster.doctor import count, diagnose, table
    from cluster.examination import examine

    machines, _ = inventory_in_use(inventory)
    if not as_json:
        print(f"examining {', '.join(machines.hosts)}", file=sys.stderr)
    rows = diagnose(machines, examine(machines))
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], **count(rows)}))
    else:
        for line in table(rows, color=sys.stdout.isatty()):
            print(line)
    return 1 if count(rows)["failed"] else 0


def _split(arguments: list[str]) -> tuple[list[str], Path]:
    files = [argument for argument in arguments if argument.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise UserError(f"two files were given: {' and '.join(files)}; give one")
    return [one for one in arguments if one not in files], Path(files[0]) if files else DEFAULT_FILE
