"""What a doctor's visit finds out about all hosts at once: facts, and what became of the trials.

    seen = examine(inventory)

Every host gets one ssh for its facts and one for its trials, all hosts in parallel. What is written or opened for a
trial is taken back at its end.
"""

import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.environments import environment_folder
from cluster.facts import Facts, asked_of, read_facts
from cluster.inventory import Host, Inventory
from cluster.remote_python import PEER_COPY, TRIAL, USUAL, Conversation, run_script
from cluster.ssh import Remote
from workbench.errors import Failure

T = TypeVar("T")

CLOCK_QUESTIONS = 5
COPY_SECONDS = 120
STORAGE_SECONDS = 30
"""A network file system whose server is gone does not fail: it waits."""


@dataclass(frozen=True)
class Clock:
    """Seconds that a host's clock is ahead of this machine's, and by how much that may be wrong."""

    ahead: float
    uncertainty: float


@dataclass(frozen=True)
class Copy:
    """A copy from one card to another. None: the driver did not say, or it was not tried, for ``reason``."""

    source: str
    target: str
    peer: bool | None
    intact: bool | None
    reason: str = ""


@dataclass
class Seen:
    """Everything known of the hosts; a host that could not be reached is in ``unreachable`` alone.

    ``unbound[host][port]`` says why a port could not be opened at the host's address, ``connections[source][target]``
    what became of a connection to each port, ``writes[host]`` and ``reads[reader][writer]`` why a file on the shared
    storage could not be written or read back ("": it could), ``copies[host]`` the copies among its cards.
    """

    facts: dict[str, Facts] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    unbound: dict[str, dict[int, str]] = field(default_factory=dict)
    connections: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    writes: dict[str, str] = field(default_factory=dict)
    reads: dict[str, dict[str, str]] = field(default_factory=dict)
    copies: dict[str, list[Copy]] = field(default_factory=dict)
    untried: dict[str, str] = field(default_factory=dict)


def examine(inventory: Inventory) -> Seen:
    """Ask and try everything. Failures of hosts are part of what is seen."""
    seen, salt = Seen(), secrets.token_hex(16)
    remotes = {name: Remote(host) for name, host in inventory.hosts.items()}
    with ThreadPoolExecutor(3 * len(remotes)) as pool:

        def everywhere(names: Iterable[str], do: Callable[[str], T]) -> dict[str, T | Failure]:
            return dict(zip(names := list(names), pool.map(lambda name: _attempt(do, name), names), strict=True))

        probed = everywhere(
            remotes, lambda name: read_facts(remotes[name], asked_of(inventory, inventory.hosts[name], salt))
        )
        for name, facts in probed.items():
            if isinstance(facts, Failure):
                seen.unreachable[name] = str(facts)
            else:
                seen.facts[name] = facts
        copies = {name: pool.submit(_attempt, _copies, remotes[name]) for name in _with_peers(inventory, seen)}
        with ExitStack() as stack:
            hosts = {
                name: stack.enter_context(
                    Conversation(remotes[name], TRIAL, interpreters=_trial_pythons(inventory, name))
                )
                for name in seen.facts
            }
            _read_clocks(seen, everywhere(hosts, lambda name: _clock(hosts[name])))
            hosts = {name: host for name, host in hosts.items() if name not in seen.untried}
            _try_ports(inventory, seen, hosts, everywhere)
            _try_storage(inventory, seen, hosts, everywhere)
        for name, future in copies.items():
            found = future.result()
            seen.copies[name] = [Copy("", "", None, None, str(found))] if isinstance(found, Failure) else found
    return seen


Everywhere = Callable[[Iterable[str], Callable[[str], T]], dict[str, T | Failure]]


def needed_ports(inventory: Inventory, name: str) -> list[int]:
    """The ports at which host ``name`` must be reached by the others; the first and last of its workers' for all."""
    ports = inventory.ports
    head = [ports.gcs, ports.client] if name == inventory.head else []
    every = [ports.node_manager, ports.object_manager, ports.agent, ports.agent_grpc, ports.runtime_env, ports.metrics]
    return [*head, *every, *ports.workers]


def _attempt(do: Callable[..., T], *arguments: object) -> T | Failure:
    try:
        return do(*arguments)
    except Failure as failure:
        return failure


def _trial_pythons(inventory: Inventory, name: str) -> list[str]:
    host = inventory.hosts[name]
    own = [f"{environment_folder(host)}/bin/python"] if inventory.storage.startswith("s3://") else []
    return [*own, *USUAL, host.python]


def _clock(host: Conversation) -> Clock:
    """The best of several questions: the one that was answered soonest."""
    answers = []
    for _ in range(CLOCK_QUESTIONS):
        sent = time.time()
        there = float(host.ask("clock")["epoch"])
        back = time.time()
        answers.append(Clock(there - (sent + back) / 2, (back - sent) / 2))
    return min(answers, key=lambda clock: clock.uncertainty)


def _read_clocks(seen: Seen, clocks: dict[str, Clock | Failure]) -> None:
    for name, clock in clocks.items():
        if isinstance(clock, Failure):
            seen.untried[name] = str(clock)
        else:
            seen.clocks[name] = clock


def _try_ports(inventory: Inventory, seen: Seen, hosts: dict[str, Conversation], everywhere: Everywhere) -> None:
    """Open what is free on every host, connect from every other, both ways at once."""
    word = secrets.token_hex(8)

    def listen(name: str) -> dict[str, object]:
        return hosts[name].ask(
            "listen", address=inventory.hosts[name].address, ports=needed_ports(inventory, name), word=word
        )

    taken: dict[str, list[int]] = {}
    for name, said in everywhere(hosts, listen).items():
        if isinstance(said, Failure):
            seen.unbound[name] = dict.fromkeys(needed_ports(inventory, name), str(said))
            continue
        seen.unbound[name] = {int(port): reason for port, reason in said["refused"].items()}
        taken[name] = said["taken"]

    def connect(source: str) -> dict[str, dict[int, str]]:
        reached = {}
        for target in taken.keys() - {source}:
            ports = [port for port in needed_ports(inventory, target) if port not in seen.unbound[target]]
            address = inventory.hosts[target].address
            found = hosts[source].ask("connect", address=address, ports=ports, taken=taken[target], word=word)
            reached[target] = {int(port): outcome for port, outcome in found.items()}
        return reached

    for source, reached in everywhere(hosts, connect).items():
        if isinstance(reached, Failure):
            seen.untried[source] = str(reached)
        else:
            seen.connections[source] = reached


def _try_storage(inventory: Inventory, seen: Seen, hosts: dict[str, Conversation], everywhere: Everywhere) -> None:
    """Every host writes a file; every host reads all of them."""
    where: dict[str, Any] = {"folder": inventory.storage, "secrets_file": inventory.secrets_file}
    visit = secrets.token_hex(8)
    names = {name: f".workbench-doctor-{visit}-{name}" for name in hosts}
    digests: dict[str, str] = {}
    for name, said in everywhere(
        hosts, lambda name: hosts[name].ask("write", timeout=STORAGE_SECONDS, name=names[name], **where)
    ).items():
        seen.writes[name] = str(said) if isinstance(said, Failure) else ""
        if not isinstance(said, Failure):
            digests[name] = said["digest"]

    def read(reader: str) -> dict[str, str]:
        found = {}
        for writer, digest in digests.items():
            said = _attempt(
                lambda writer=writer: hosts[reader].ask("read", timeout=STORAGE_SECONDS, name=names[writer], **where)
            )
            if isinstance(said, Failure):
                found[writer] = str(said)
            else:
                found[writer] = "" if said["digest"] == digest else "other bytes than were written"
        return found

    for reader, found in everywhere(hosts, read).items():
        seen.reads[reader] = {} if isinstance(found, Failure) else found


def _with_peers(inventory: Inventory, seen: Seen) -> list[str]:
    """The hosts with several cards and an environment whose torch can use them."""
    return [
        name
        for name, facts in seen.facts.items()
        if facts.nvidia and len(facts.nvidia.cards) > 1 and facts.environment and facts.environment.torch_cuda
    ]


def _copies(remote: Remote) -> list[Copy]:
    return copies_on(remote, remote.host, {})


def copies_on(remote: Remote, host: Host, asked: dict[str, object]) -> list[Copy]:
    """Every copy among the cards of ``host``. Raises Failure with the pair at which it hung."""
    python = f"{environment_folder(host)}/bin/python"
    return [Copy(**entry) for entry in run_script(remote, PEER_COPY, asked, python=python, timeout=COPY_SECONDS)]
