#!/usr/bin/env bash
# Find Python and run one of the paper's tables; the table scripts call this: run_table.sh TABLE [options].
# PYTHON names another interpreter than .venv's. Paths in the options are seen from the caller's folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] && PYTHON=${PYTHON:-$root/.venv/bin/python}
# the repository's modules, and none of the caller's folder
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
exec "${PYTHON:-python}" -m paper run "$@"
