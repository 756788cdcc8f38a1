"""The process of a submitted job that named secrets or a card: takes both, then is the command.

    python -m cluster.job_entry --secret HF_TOKEN --cards GPU-5f0c... -- data embed configs/data/embed.yaml

A card is set here and not in the job's runtime environment, which every worker of the job would inherit.
"""

import argparse
import sys

from cluster.job_secrets import adopt
from workbench.config import adopt_environment
from workbench.errors import UserError


def main(argv: list[str]) -> None:
    """Run ``workbench COMMAND`` in this process; exits with its code."""
    parser = argparse.ArgumentParser(prog="cluster.job_entry")
    parser.add_argument("--secret", action="append", default=[])
    parser.add_argument("--cards", default="")
    split = argv.index("--")
    options = parser.parse_args(argv[:split])
    try:
        if options.secret:
            adopt(options.secret)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    if options.cards:
        adopt_environment({"CUDA_VISIBLE_DEVICES": options.cards})
    from workbench.cli import main as command

    command(argv[split + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
