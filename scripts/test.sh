#!/usr/bin/env bash
# The whole check: environment, linter, type checker, tests. Two cores: about 10 minutes, installation included.
#
#   bash scripts/test.sh                                  # what continuous integration runs
#   bash scripts/test.sh -m slow                          # further arguments go to pytest
#   REQUIREMENTS=requirements-v100.txt VENV=.venv-v100 bash scripts/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
bash scripts/install.sh "${REQUIREMENTS:-requirements.txt}" requirements-dev.txt
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
[ -n "${REQUIREMENTS:-}" ] || "$VENV/bin/mypy" # other versions of torch have other types
export OMP_NUM_THREADS=1
selection=("$@")
[ $# -gt 0 ] || selection=(-m "not slow and not gpu")
exec "$VENV/bin/python" -m pytest -n 2 "${selection[@]}"
