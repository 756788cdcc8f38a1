"""Runs that lie on a cluster's storage, read from a laptop that is no member of it: through Ray jobs alone.

A run travels on the job's log, the one channel that the job API has from the cluster to the client: a tar.gz in
base64 lines, each marked, with its SHA-256 at the end.
"""

import base64
import binascii
import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from workbench.errors import Failure, UserError
from workbench.files import write_json

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

MARK = "workbench-archive "
LINE_BYTES = 57 * 1024
INCOMING = ".incoming"


@dataclass(frozen=True)
class Archive:
    """What a sender says of the archive it sent: the run's id, bytes, SHA-256, and the files it left out (bytes)."""

    run: str
    bytes: int
    sha256: str
    left_out: dict[str, int]


def send(folder: Path, run: str, max_file_bytes: int | None) -> Iterator[str]:
    """The marked lines that carry a run folder; files above ``max_file_bytes`` (None: no limit) are left out."""
    left_out: dict[str, int] = {}
    with TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path in sorted(folder.rglob("*")):
                if not path.is_file() or path.is_symlink() or path.name.endswith(".partial"):
                    continue
                name, size = path.relative_to(folder).as_posix(), path.stat().st_size
                if max_file_bytes is not None and size > max_file_bytes:
                    left_out[name] = size
                else:
                    archive.add(path, arcname=name)
        size = packed.tell()
        packed.seek(0)
        digest = hashlib.sha256()
        while block := packed.read(LINE_BYTES):
            digest.update(block)
            yield MARK + base64.b64encode(block).decode()
        yield MARK + json.dumps({"run": run, "bytes": size, "sha256": digest.hexdigest(), "left_out": left_out})


def receive(lines: Iterable[str], packed: IO[bytes]) -> Archive:
    """Write the archive that ``lines`` carry, among other lines, to ``packed``. Raises Failure unless it is whole."""
    digest = hashlib.sha256()
    for line in lines:
        if not line.startswith(MARK):
            continue
        payload = line.removeprefix(MARK).strip()
        if payload.startswith("{"):
            archive = Archive(**json.loads(payload))
            if archive.sha256 != digest.hexdigest():
                raise Failure("the archive was damaged on its way: its SHA-256 differs; pull again")
            return archive
        try:
            block = base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise Failure(f"the archive was damaged on its way: {error}; pull again") from None
        digest.update(block)
        packed.write(block)
    raise Failure("the archive did not arrive whole: the job's log has no end mark")


def unpack(packed: IO[bytes], archive: Archive, root: Path, origin: str) -> Path:
    """Unpack a received run below ``root``, whole or not at all, with ``pulled.json`` beside it; its folder.

    Raises UserError if the run is there already, Failure if the archive tries to write outside its folder.
    """
    kind, _, name = archive.run.partition("/")
    if not name or {kind, name} & {".", ".."} or "/" in name:
        raise Failure(f"the cluster sent a run named '{archive.run}', which is no GROUP-COMMAND/TIME-NAME")
    with _incoming(root, kind, name) as folder:
        packed.seek(0)
        try:
            with tarfile.open(fileobj=packed, mode="r:gz") as tar:
                tar.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise Failure(f"the archive is not safe to unpack: {error}") from None
        write_json(folder / "pulled.json", {"from": origin, "left_out": archive.left_out})
        return _settle(folder, root / kind / name)


def copy(source: Path, root: Path) -> Path:
    """Copy a run folder that is mounted here to below ``root``, whole or not at all; its new folder."""
    kind, name = source.parent.name, source.name
    with _incoming(root, kind, name) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.partial"))
        write_json(folder / "pulled.json", {"from": str(source), "left_out": {}})
        return _settle(folder, root / kind / name)


def pull(client: "JobSubmissionClient", run: str, cluster_root: Path, to: Path, max_file_bytes: int | None) -> Archive:
    """Fetch ``run`` from a cluster's runs root to below ``to``.

    Raises UserError if the cluster has no such run or it is here already, Failure if it does not arrive whole.
    """
    limit = [] if max_file_bytes is None else ["--max-bytes", str(max_file_bytes)]
    log = run_job(client, ["runs", "send", run, *limit], cluster_root)
    with TemporaryFile() as packed:
        archive = receive(log.splitlines(), packed)
        unpack(packed, archive, to, f"{client.get_address()}{cluster_root}")
    return archive


def list_rows(client: "JobSubmissionClient", arguments: list[str], cluster_root: Path) -> list[dict[str, Any]]:
    """What ``workbench runs list`` says on the cluster."""
    log = run_job(client, ["runs", "list", "--json", *arguments], cluster_root)
    for line in log.splitlines():
        if line.startswith("[") and line.endswith("]"):
            try:
                rows: list[dict[str, Any]] = json.loads(line)
            except json.JSONDecodeError:
                continue
            return rows
    raise Failure(f"the cluster's list of runs did not arrive; its log ends with: {log[-300:]}")


def run_job(client: "JobSubmissionClient", command: list[str], cluster_root: Path) -> str:
    """The log of ``workbench COMMAND`` as a Ray job, once it has succeeded.

    Raises UserError or Failure with the command's own message when it ends badly. Stops the job if interrupted.
    """
    from cluster.jobs import follow, submit

    job = submit(client, command, runs_root=cluster_root)
    try:
        code = follow(client, job, lambda _: None)
    except BaseException:
        client.stop_job(job)
        raise
    log = client.get_job_logs(job)
    if code == 0:
        return log
    message = next(
        (line for line in reversed(log.splitlines()) if line.startswith(("error: ", "failed: "))), log[-500:]
    )
    kind = UserError if code == UserError.exit_code else Failure
    raise kind(f"on the cluster: {message.partition(': ')[2] or message}")


@contextmanager
def _incoming(root: Path, kind: str, name: str) -> Iterator[Path]:
    """A folder to fill before it becomes ``root/kind/name``; what is left of it at the end is removed."""
    if (root / kind / name).exists():
        raise UserError(f"{root / kind / name} is there already: delete it, or pull to another folder with --to")
    (root / INCOMING).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root / INCOMING) as holder:  # deeper than a run, so no list shows it
        folder = Path(holder, "run")
        folder.mkdir()
        yield folder


def _settle(folder: Path, target: Path) -> Path:
    if not (folder / "status.json").is_file():
        raise Failure(f"{target.name} has no status.json: it is no run folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    return folder.rename(target)
