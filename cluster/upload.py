"""What a job's upload would weigh, before it is packed: Ray's own walk of the folder, a limit, the largest files."""

import logging
from pathlib import Path

from workbench.errors import UserError

LIMIT_MB = 100
EXCLUDES = ["/.git"]
SHOWN = 5


def upload_files(folder: Path, excludes: list[str]) -> dict[Path, int]:
    """Bytes of each file that Ray would upload: all but what git, ``.rayignore`` or ``excludes`` leave out."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: dict[Path, int] = {}

    def weigh(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(folder)] = path.stat().st_size

    quiet = logging.getLogger(f"{__name__}.walk")
    quiet.setLevel(logging.CRITICAL)
    _dir_travel(folder, [_get_excludes(folder, excludes)], weigh, include_gitignore=True, logger=quiet)
    return files


def check_upload(folder: Path, limit_mb: float = LIMIT_MB) -> int:
    """The bytes that a job would upload. Raises UserError above ``limit_mb``, naming the largest files."""
    files = upload_files(folder, EXCLUDES)
    total = sum(files.values())
    if total > limit_mb * 1e6:
        largest = sorted(files.items(), key=lambda item: -item[1])[:SHOWN]
        raise UserError(
            f"{folder} weighs {total / 1e6:,.1f} MB, more than the {limit_mb:g} MB that travel with a job; its largest "
            "files:\n"
            + "\n".join(f"  {size / 1e6:>10,.1f} MB  {file}" for file, size in largest)
            + "\ndata goes to the shared storage with 'workbench cluster push PATH'; what else is not needed goes into "
            ".gitignore or .rayignore; --max-upload MB raises the limit"
        )
    return total
