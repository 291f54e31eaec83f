#!/usr/bin/env bash
# The mixing desk in headless Chromium: installs Chromium and its driver where apt-get can (Debian,
# Ubuntu), then runs the browser tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update -qq
    $as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver
fi
.venv/bin/python -m pytest -n 0 tests/test_playground.py "$@"
