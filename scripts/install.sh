#!/usr/bin/env bash
# Make .venv beside README and install requirement files into it; does nothing where that is already done.
#
#   bash scripts/install.sh                                   # requirements.txt
#   bash scripts/install.sh requirements-v100.txt             # for V100 GPUs
#   PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> bash scripts/install.sh requirements-cpu.txt    # no CUDA libraries
#   PYTHON=python3.12 VENV=/somewhere/venv bash scripts/install.sh requirements.txt requirements-dev.txt
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
files=("${@:-requirements.txt}")

usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }
for python in ${PYTHON:-python3.12 python3.11 python3.13 python3.14 python3}; do
    if usable "$python"; then
        PYTHON=$python
        break
    fi
done
if ! usable "${PYTHON:-python3}"; then
    echo "Python 3.11, 3.12, 3.13 or 3.14 is needed; name one: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 2
fi

done_with() { cmp -s "$1" "$VENV/installed/$(basename "$1")"; }
missing=()
for file in "${files[@]}"; do
    done_with "$file" || missing+=("$file")
done
if [ ${#missing[@]} = 0 ]; then
    exit 0
fi
size="on Linux a download of 3 GB, 6 GB on the disk, most of it CUDA libraries; minutes"
[[ ${files[*]} != *requirements-cpu.txt* ]] || size="without CUDA libraries"
echo "Installing ${files[*]} into $VENV ($size) ..."
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
    echo "$PYTHON -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
}
rm -rf "$VENV/installed" # what is recorded there may be about to be replaced
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]/#/-r}" || {
    [[ ${files[*]} != *requirements-cpu.txt* ]] ||
        echo "the +cpu builds are on PyTorch's own index: PIP_EXTRA_INDEX_URL=<its address> bash $0 ${files[*]}" >&2
    exit 1
}
mkdir "$VENV/installed"
cp "${files[@]}" "$VENV/installed"
