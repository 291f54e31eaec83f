#!/usr/bin/env bash
# What one GPU makes of models of 1B and 8B, in about ten minutes; --dry-run tries it on the CPU.
# Uses the project's environment where there is one, else the Python that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" benchmarks/gpu.py "$@"
