"""NVIDIA's own nvbandwidth beside our copies, where it is installed (https://github.com/NVIDIA/nvbandwidth)."""

import json
import shutil
import subprocess
from typing import Any

TESTS = {
    "host_to_device_memcpy_ce": "host to card {column}, pinned",
    "device_to_host_memcpy_ce": "card {column} to host, pinned",
    "device_to_device_memcpy_write_ce": "card {row} to card {column}, peer to peer",
}
"""Its tests, and the way of ours that each cell of their matrices is."""


def run_nvbandwidth(seconds: float = 300.0) -> dict[str, Any]:
    """GB/s by the name of our way; ``missing`` says why there are none."""
    program = shutil.which("nvbandwidth")
    if program is None:
        return {"missing": "nvbandwidth is not installed"}
    command = [program, "--json", *(word for test in TESTS for word in ("--testcase", test))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return read_answer(done.stdout)
    except (OSError, subprocess.SubprocessError) as error:
        return {"missing": f"nvbandwidth: {error}"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"missing": "nvbandwidth gave an answer that is not understood"}


def read_answer(answer: str) -> dict[str, Any]:
    """What its JSON says. Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    told = json.loads(answer)["nvbandwidth"]
    if "error" in told:
        return {"missing": f"nvbandwidth: {told['error']}"}
    rates: dict[str, Any] = {}
    for test in told["testcases"]:
        for row, cells in enumerate(test.get("bandwidth_matrix", [])):
            for column, cell in enumerate(cells):
                if test["name"] in TESTS and cell != "N/A":
                    rates[TESTS[test["name"]].format(row=row, column=column)] = float(cell)
    return rates
