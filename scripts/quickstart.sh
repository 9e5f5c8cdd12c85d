#!/usr/bin/env bash
# From a fresh clone to a trained SAR ViT and a picture of its attention, with no data to fetch.
#
#   bash scripts/quickstart.sh
#   REQUIREMENTS=requirements-v100.txt bash scripts/quickstart.sh     # V100 GPUs
#   OUT=elsewhere bash scripts/quickstart.sh --epochs 64             # further arguments go to main.py
#
# Hardware: anything with Python 3.11 to 3.14; a GPU is used if there is one.
# Time: the installation once (a few minutes), then under four minutes on two cores.
# Expected: at least 95 % of 360 test digits, and pictures of attention maps in output/quickstart/figures.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
OUT=${OUT:-output/quickstart}
bash scripts/install.sh "${REQUIREMENTS:-requirements.txt}"
"$VENV/bin/python" main.py @recipes/quickstart.args --output-dir "$OUT" "$@"
echo
"$VENV/bin/python" main.py --eval --resume "$OUT/best.pth"
"$VENV/bin/python" -m analysis.figures --checkpoint "$OUT/best.pth" --out "$OUT/figures"
