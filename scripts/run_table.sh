#!/usr/bin/env bash
# Find Python and hand it the rows of a table on standard input; the table scripts call this.
# PYTHON names another interpreter than .venv's.
# Paths in DATA, OUT, OVERRIDES, CKPT_BASE, CKPT_SAR, IMAGES and PYTHON are seen from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
[ "${SMOKE:-}" = 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more threads would slow a tiny model
exec "${PYTHON:-python}" -m paper.run "$@"
