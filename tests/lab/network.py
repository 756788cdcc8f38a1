"""The lab's network: a bridge in a network namespace of its own, which nothing connects with the machine's interfaces.

A link is cut at the bridge: frames vanish both ways, the host keeps its carrier, nobody is told.
"""

import subprocess

SUBNET = "10.77.0"


class Network:
    """The bridge in the namespace of process ``pid``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def create(self) -> None:
        """Set up the bridge and the empty table of cut links."""
        self._inside("ip", "link", "set", "lo", "up")
        self._inside("ip", "link", "add", "lab", "type", "bridge")
        self._inside("ip", "link", "set", "lab", "up")
        self._nft("add table bridge lab")
        self._nft("add set bridge lab cut { type ifname; }")
        self._nft("add chain bridge lab forward { type filter hook forward priority 0; }")
        self._nft("add rule bridge lab forward iifname @cut drop")
        self._nft("add rule bridge lab forward oifname @cut drop")

    def plug(self, name: str, pid: int, address: str) -> None:
        """Give the host whose PID 1 is ``pid`` an ``eth0`` with ``address``."""
        port = _port(name)
        self._inside("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._inside("ip", "link", "set", port, "master", "lab", "up")
        enter = ("nsenter", f"--target={pid}", "--net", "--", "ip")
        _call(*enter, "address", "add", f"{address}/24", "dev", "eth0")
        _call(*enter, "link", "set", "eth0", "up")

    def cut(self, name: str) -> None:
        """Drop every frame from and to host ``name``, in silence."""
        self._nft(f"add element bridge lab cut {{ {_port(name)} }}")

    def mend(self, name: str) -> None:
        """Let frames pass again."""
        self._nft(f"delete element bridge lab cut {{ {_port(name)} }}")

    def _inside(self, *command: str) -> None:
        _call("nsenter", f"--target={self.pid}", "--net", "--", *command)

    def _nft(self, rule: str) -> None:
        self._inside("nft", rule)


def _port(name: str) -> str:
    """An interface name has 15 characters at most."""
    return f"p-{name}"[:15]


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
