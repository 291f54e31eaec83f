#!/usr/bin/env bash
# Does llama.cpp answer with an exported adapter as the merged model does? Installs llama.cpp (the
# xllamacpp wheel) into .venv, then runs the test: bash scripts/test_llama_cpp.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'xllamacpp>=2026.10'
.venv/bin/python -m pytest -n 0 tests/judges/test_llama_cpp.py "$@"
