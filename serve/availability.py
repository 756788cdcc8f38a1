"""Whether this machine can serve: a light check that imports neither vLLM nor Ray."""

import importlib.util
import sys


def available() -> str | None:
    """None where vLLM is installed, else one sentence: why it is not, and what to do."""
    if importlib.util.find_spec("vllm") is not None:
        return None
    if sys.platform == "darwin":
        return (
            "vLLM has no macOS build: serve from a Linux machine of the cluster with "
            "'workbench submit --address http://HEAD:8265 -- serve up CONFIG.yaml', and ask it from here"
        )
    if not sys.platform.startswith("linux"):
        return f"vLLM has no build for {sys.platform}: serve from a Linux machine of the cluster"
    return "vLLM is not installed: run 'make install', or pip install -e '.[cpu]' (with an NVIDIA card: '.[cuda]')"
