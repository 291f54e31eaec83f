#!/usr/bin/env bash
# Build the documentation site into build/docs (open build/docs/index.html); warnings are errors.
# Needs the docs extra: .venv/bin/pip install -e '.[docs]'. Arguments go to mkdocs build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-.venv/bin/python}" -m mkdocs build --strict --clean "$@"
