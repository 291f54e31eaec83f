#!/usr/bin/env bash
# From nothing to a judged sweep: set up, check the data, train a positive and a negative LoRA for
# sycophancy, steer with their difference, judge, and write one HTML report. Run again, it reuses
# what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
QUESTIONS=${QUESTIONS:-20} bash scripts/train_and_sweep.sh sycophancy
echo "open $PWD/results/sweep/sycophancy/report.html"
