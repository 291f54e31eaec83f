#!/usr/bin/env bash
# Do the tests notice a change of the code? bash scripts/mutation.sh core/settings report/wording …
# makes one small change after another in each module (cosmic-ray), runs the tests of its room that
# import it for each, and prints how many changes survive. Without arguments: all of core, steering,
# projections, report and cli, which takes days of one core. Works on a copy of the commit at hand;
# needs cosmic-ray (pip install cosmic-ray). MUTATION_PYTEST adds options of pytest (--noconftest
# where the tests need no fixture of ours: a second each, not ten), MUTATION_TIMEOUT the seconds after
# which a change that makes a loop endless counts as noticed (120).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git archive HEAD | tar -x -C "$copy"
cd "$copy"
export PYTHONPATH=$copy HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1

modules=("$@")
if [ ${#modules[@]} -eq 0 ]; then
    mapfile -t modules < <(cd persona_lora && find core steering projections report cli \
        -name '*.py' ! -name '__init__.py' | sed 's/\.py$//' | sort)
fi
for module in "${modules[@]}"; do
    name=persona_lora.${module//\//.}
    room=${module%%/*}
    tests=$({ grep -rlE "(from|import) ${name//./\\.}( |\$)" "tests/$room" || true
              grep -lE "(from|import) ${name//./\\.}( |\$)" tests/*.py || true; } 2>/dev/null | sort -u | paste -sd' ' -)
    if [ -z "$tests" ]; then
        echo "$module: no test imports it"
        continue
    fi
    cat >session.toml <<TOML
[cosmic-ray]
module-path = "persona_lora/$module.py"
timeout = ${MUTATION_TIMEOUT:-120}
excluded-modules = []
test-command = "$python -m pytest -q -x -p no:cacheprovider ${MUTATION_PYTEST:-} $tests"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]  # "str | None" in annotations
TOML
    rm -f session.sqlite
    "$python" -m cosmic_ray.cli baseline session.toml >/dev/null ||
        { echo "$module: its tests fail before any change"; exit 1; }
    "$python" -m cosmic_ray.cli init session.toml session.sqlite >/dev/null
    "$(dirname "$python")/cr-filter-operators" session.sqlite session.toml
    "$python" -m cosmic_ray.cli exec session.toml session.sqlite
    echo "$module ($tests)"
    "$(dirname "$python")/cr-report" session.sqlite --surviving-only --show-diff | tail -n "${MUTATION_LINES:-400}"
done
