"""An interpreter path without spaces: Ray starts workers through a shell that splits the path at them.

    python workbench/interpreter.py        # prints the path to use instead of .venv/bin/python

Where the environment's path has white space, it is the same environment seen through a symbolic link in a folder of the
user's own below the temporary folder. Python takes the environment from the path it was called by.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path


def has_space(path: str) -> bool:
    """Whether a shell would split ``path``."""
    return len(path.split()) > 1


def interpreter() -> str:
    """This environment's interpreter by a path without white space. Raises PermissionError if the folder of links is
    another user's."""
    if not has_space(sys.executable):
        return sys.executable
    links = Path(tempfile.gettempdir()) / f"workbench-{os.getuid()}"
    links.mkdir(mode=0o700, exist_ok=True)
    if links.lstat().st_uid != os.getuid() or links.is_symlink():
        raise PermissionError(f"{links} belongs to another user: set TMPDIR to a folder of your own")
    link = links / hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    with contextlib.suppress(FileExistsError):
        link.symlink_to(sys.prefix, target_is_directory=True)
    return str(link / "bin" / Path(sys.executable).name)


def leave_spaces_behind() -> None:
    """Replace this process by the same command under ``interpreter()``, if its path has white space."""
    if has_space(sys.executable):
        path = interpreter()
        os.execv(path, [path, "-m", "workbench", *sys.argv[1:]])


if __name__ == "__main__":
    print(interpreter())
