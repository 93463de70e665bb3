#!/usr/bin/env bash
# Creates .venv and installs the project with its development tools, at the versions of constraints.txt.
# Called by `make setup`. PYTHON names the interpreter to build on (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CPU_INDEX=https://download.pytorch.org/whl/cpu

require_python() {
    if ! command -v "$PYTHON" >/dev/null; then
        echo "make setup: $PYTHON not found; install Python 3.11 or newer, or say PYTHON=/path/to/python" >&2
        exit 1
    fi
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "make setup: $PYTHON is $("$PYTHON" --version); Python 3.11 or newer is needed:" \
            "make setup PYTHON=python3.11" >&2
        exit 1
    fi
}

create_environment() {
    if ! "$PYTHON" -m venv .venv; then
        echo "make setup: cannot create .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
}

pip_install() {
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check "$@"
}

# PyPI's torch for Linux brings gigabytes of CUDA libraries, so without a GPU the CPU build is tried first. Its
# own index may be out of reach (behind a firewall): then whatever pip finds is taken.
install_torch() {
    local torch
    echo "make setup: torch"
    torch=$(grep '^torch==' constraints.txt)
    if command -v nvidia-smi >/dev/null; then
        pip_install "$torch" -c constraints.txt
    elif ! pip_install "$torch" --no-deps --index-url "$CPU_INDEX" --timeout 10 --retries 0 2>/dev/null; then
        echo "make setup: no CPU build from $CPU_INDEX, taking torch from the default index"
        pip_install "$torch" -c constraints.txt
    fi
    echo "make setup: took $(.venv/bin/python -m pip list --disable-pip-version-check --format freeze | grep '^torch==')"
}

require_python
create_environment
echo "make setup: installing into .venv; this takes a few minutes"
pip_install --upgrade pip
install_torch
echo "make setup: everything else"
pip_install -e '.[dev]' -c constraints.txt
echo "make setup: done"
