"""``cluster push PATH``: data goes to the shared storage by itself, not with a job, and a job is told where it is.

    uri = push(inventory, Path("corpus"))       # /mnt/cluster/data/corpus, or s3://bucket/prefix/data/corpus

Interrupted and started again, it sends what is missing: rsync keeps what arrived of a file, S3 has whole objects only.
Without rsync on both sides a tar stream is unpacked beside the target and moved there whole.
"""

import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from cluster.host_state import run_script
from cluster.inventory import Inventory
from cluster.ssh import Remote
from workbench.errors import Failure, UserError

FOLDER = "data"
PARTIAL = ".rsync-partial"


def push(inventory: Inventory, path: Path, *, name: str = "") -> str:
    """Copy a file or folder to the cluster's storage, as ``name``; what a job calls it.

    Raises UserError if there is no such path, Failure if the copy did not succeed.
    """
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    name = name or path.resolve().name
    if "/" in name or name in ("", ".", ".."):
        raise UserError(f"'{name}' is no name for a file or folder below {inventory.storage}/{FOLDER}")
    target = f"{inventory.storage}/{FOLDER}/{name}"
    if inventory.storage.startswith("s3://"):
        _to_object_store(path, target)
        return target
    remote = Remote(inventory.hosts[inventory.head])
    storage = shlex.quote(inventory.storage)
    there = run_script(
        remote,
        f"[ -d {storage} ] || {{ echo 'no folder' {storage}': is it mounted?' >&2; exit 1; }}\n"
        f"mkdir -p {storage}/{FOLDER}\ncommand -v rsync || true",
    )
    # Versions of rsync differ in who quotes a name, so one that needs quotes goes another way.
    if there.stdout.strip() and shutil.which("rsync") and shlex.quote(target) == target:
        _by_rsync(remote, path, target)
    else:
        _by_tar(remote, path, target)
    return target


def _by_rsync(remote: Remote, path: Path, target: str) -> None:
    source = f"{path.resolve()}/" if path.is_dir() else str(path.resolve())
    destination = f"{target}/" if path.is_dir() else target
    done = subprocess.run(
        ["rsync", "-a", "--partial", f"--partial-dir={PARTIAL}", "-e", shlex.join(remote.ssh()),
         source, f"{remote.host.user}@{_bracketed(remote.host.address)}:{destination}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Failure(f"rsync to {remote.name()} ended: {said[0]}; the same command again goes on from there")


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _by_tar(remote: Remote, path: Path, target: str) -> None:
    folder, name = os.path.split(target)
    fresh, old = shlex.quote(f"{folder}/.{name}.new"), shlex.quote(f"{folder}/.{name}.old")
    final = shlex.quote(target)
    script = (
        f"rm -rf {fresh} {old} && mkdir -p {fresh} && tar -xf - -C {fresh} && "
        f"{{ [ ! -e {final} ] || mv {final} {old}; }} && mv {fresh}/{shlex.quote(name)} {final} && rm -rf {fresh} {old}"
    )
    process = subprocess.Popen(remote.command(script), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    try:
        with process.stdin, tarfile.open(fileobj=process.stdin, mode="w|") as tar:
            tar.add(path.resolve(), arcname=name)
    except OSError:
        pass  # the other side has ended; it says below why
    said = process.stderr.read().decode(errors="replace").strip()
    process.stderr.close()
    if process.wait():
        raise Failure(f"copy to {remote.name()} ended: {said or process.returncode}; nothing was changed there")


def _to_object_store(path: Path, target: str) -> None:
    from pyarrow import fs

    try:
        store, root = fs.FileSystem.from_uri(target)
        for file, place in _objects(path, root):
            if not _is_there(store, file, place):
                local = fs.LocalFileSystem()
                fs.copy_files(str(file), place, source_filesystem=local, destination_filesystem=store)
    except OSError as error:
        raise Failure(f"copy to {target} ended: {error}; the same command again goes on from there") from None


def _objects(path: Path, root: str) -> list[tuple[Path, str]]:
    if path.is_file():
        return [(path, root)]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [(file, f"{root}/{file.relative_to(path).as_posix()}") for file in files]


def _is_there(store: Any, file: Path, place: str) -> bool:
    """Whether the object has the file's size and is not older: S3 shows an object only when it is whole."""
    info = store.get_file_info(place)
    if not info.is_file or info.size != file.stat().st_size:
        return False
    return info.mtime_ns is not None and info.mtime_ns >= file.stat().st_mtime_ns
