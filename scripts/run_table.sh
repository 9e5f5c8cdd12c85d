#!/usr/bin/env bash
# Find Python and hand it the rows of a table on standard input; the table scripts call this.
# PYTHON names another interpreter than .venv's. Paths in DATA, OUT and OVERRIDES are seen from the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
exec "${PYTHON:-python}" scripts/run_table.py "$@"
