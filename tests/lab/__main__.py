"""A lab to look around in: three hosts and a laptop, until it is told to end.

cd tests
../.venv/bin/python -m lab up
../.venv/bin/python -m lab run laptop 'workbench cluster init --discover ada@system-a ada@linux-box'
../.venv/bin/python -m lab cut linux-box        # and mend
../.venv/bin/python -m lab down
"""

import argparse
import subprocess
import sys

from lab.lab import Lab, missing
from lab.site import HOSTS, Site


def main() -> int:
    """Run one verb; the exit code of the command for ``run``."""
    parser = argparse.ArgumentParser(prog="lab")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("up", help="start the lab")
    run = verbs.add_parser("run", help="run a command in a host")
    run.add_argument("--root", action="store_true", help="as root")
    run.add_argument("host")
    run.add_argument("command")
    for verb in ("cut", "mend"):
        verbs.add_parser(verb, help=f"{verb} a host's link").add_argument("host")
    clock = verbs.add_parser("clock", help="shift the clock of what comes over ssh")
    clock.add_argument("host")
    clock.add_argument("seconds", type=float)
    verbs.add_parser("down", help="end the lab")
    asked = parser.parse_args()
    if asked.verb == "up":
        if reason := missing():
            print(reason, file=sys.stderr)
            return 1
        lab = Lab.start(HOSTS, stay=True)
        Site(lab)
        print("\n".join(f"{host.address}  {name}" for name, host in lab.hosts.items()))
        return 0
    try:
        lab = Lab.attach()
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    Site(lab)
    if asked.verb == "run":
        return subprocess.run(lab[asked.host].command(asked.command, root=asked.root), check=False).returncode
    if asked.verb == "clock":
        lab[asked.host].shift_clock(asked.seconds)
    elif asked.verb == "down":
        lab.stop()
    else:
        {"cut": lab.cut, "mend": lab.mend}[asked.verb](asked.host)
    return 0


sys.exit(main())
