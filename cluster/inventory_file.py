"""``cluster.yaml`` written for a person: every key explained where it first stands, what is left at its default
commented out.

    text = annotated(three_machines("ada"))
"""

import json
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.inventory import Card, Inventory, PcieLink, Ports

COMMENT_COLUMN = 46
EXAMPLES: dict[str, Any] = {"supervisor": "systemd", "cpus": 12, "object_store_gb": 8, "reserved": "true"}
"""What stands in a comment for a key whose default is worked out."""

HEAD = """\
# The machines of this cluster. Every command of 'workbench cluster' reads this file.
# A line that begins with '# ' and a key holds its default or an example: take the '# ' away to change it.
# Look at it with: workbench cluster doctor --inventory {file}
"""
TEMPLATE_HEAD = """\
#
# Put your own addresses and users in. 'workbench cluster init --discover USER@HOST...' asks the machines instead, and
# fills in the cards' UUIDs, without which no task can be given one card and no other.
"""


def three_machines(user: str) -> Inventory:
    """The cluster that this workbench is made for: System A, a Linux box and a Mac laptop; addresses are examples."""
    five = {"generation": 5}
    return Inventory.model_validate(
        {
            "head": "system-a",
            "storage": "/srv/workbench",
            "hosts": {
                "system-a": {
                    "address": "192.168.1.10",
                    "user": user,
                    "os": "linux",
                    "cards": [
                        {"model": "rtx-5090", "memory_gb": 32, "pcie": {**five, "width": 16}},
                        {"model": "rtx-pro-6000", "memory_gb": 96, "pcie": {**five, "width": 16}},
                    ],
                },
                "linux-box": {
                    "address": "192.168.1.11",
                    "user": user,
                    "os": "linux",
                    "cards": [{"model": "rtx-5060-ti", "memory_gb": 16, "pcie": {**five, "width": 8}}],
                },
                "macbook": {"address": "192.168.1.12", "user": user, "os": "macos", "mps": 1},
            },
        }
    )


NOTES = {
    "storage": "For example an NFS export of the head, mounted at this path on all three.",
    "hosts.system-a": "A board that shares 16 lanes between two cards gives each x8: then write width: 8.",
    "hosts.macbook": "Its GPU is asked for as 'mps: 1'; plain GPU requests never come here.",
}
"""What is said above a host, or a key, of the template."""


def annotated(inventory: Inventory, *, file: str = "cluster.yaml", notes: dict[str, str] | None = None) -> str:
    """The text of an inventory file that ``read_inventory`` reads as ``inventory``.

    ``notes`` are comments above ``hosts.NAME`` and ``storage``; without them the file is the template.
    """
    own = NOTES if notes is None else notes
    head = HEAD.format(file=file) + (TEMPLATE_HEAD if notes is None else "")
    explained: set[type[BaseModel]] = set()
    return head + "\n" + "\n".join(_model(inventory, "", "", explained, own)) + "\n"


def _model(
    model: BaseModel, indent: str, path: str, explained: set[type[BaseModel]], notes: dict[str, str]
) -> Iterator[str]:
    """The lines of a model: keys that are set, and, the first time, all others as comments."""
    first = type(model) not in explained
    explained.add(type(model))
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        given = key in model.model_fields_set
        if isinstance(value, Ports):
            yield f"\n{'' if given else '# '}ports:  # {field.description}"
            yield from _ports(value, given)
        elif given and key == "hosts":
            yield f"\nhosts:  # {field.description}"
            for place, (name, host) in enumerate(value.items()):
                if place:
                    yield ""
                if note := notes.get(f"hosts.{name}"):
                    yield f"  # {note}"
                yield f"  {name}:"
                yield from _model(host, "    ", f"hosts.{name}", explained, notes)
        elif given and key == "cards":
            yield f"{indent}cards:" + (f"  # {field.description}" if first else "")
            for card in value:
                yield from _card(card, indent + "  ", explained, notes)
        elif given and isinstance(value, PcieLink):
            line = _line(indent, key, _flow(value), field if first else None)
            yield f"{line}: PCIe generation and lanes" if first else line
        elif given or first:
            if not indent and (key == "storage" or key == "keep_sessions_days"):
                yield ""
                yield from ([f"# {notes[key]}"] if key in notes else [])
            yield _line(indent if given else f"{indent}# ", key, _scalar(key, value, given), field if first else None)


def _card(card: Card, indent: str, explained: set[type[BaseModel]], notes: dict[str, str]) -> Iterator[str]:
    lines = list(_model(card, indent + "  ", "", explained, notes))
    yield f"{indent}- {lines[0].removeprefix(indent + '  ')}"
    yield from lines[1:]


def _ports(ports: Ports, given: bool) -> Iterator[str]:
    for key, field in type(ports).model_fields.items():
        own = given and key in ports.model_fields_set
        value = getattr(ports, key)
        yield _line("  " if own else "#   ", key, f"[{value[0]}, {value[1]}]" if key == "workers" else value, field)


def _line(indent: str, key: str, value: Any, field: FieldInfo | None) -> str:
    line = f"{indent}{key}: {value}"
    return f"{line:<{COMMENT_COLUMN}}  # {field.description}" if field is not None and field.description else line


def _flow(link: PcieLink) -> str:
    return f"{{generation: {link.generation}, width: {link.width}}}"


def _scalar(key: str, value: Any, given: bool) -> str:
    """A value as YAML on one line; of a default that is worked out, an example."""
    if value is None:
        return "null" if given else str(EXAMPLES[key])
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and value and _reads_as_written(value):
        return value
    return json.dumps(value)


def _reads_as_written(text: str) -> bool:
    try:
        return bool(yaml.safe_load(f"- {text}") == [text])
    except yaml.YAMLError:
        return False
