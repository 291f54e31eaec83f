#!/usr/bin/env bash
# Set up, then run every check. Arguments go to pytest: bash scripts/test.sh tests/core -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export HF_HUB_OFFLINE=1

.venv/bin/ruff check --no-cache .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n auto --dist loadfile "$@"
