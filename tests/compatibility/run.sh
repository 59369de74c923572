#!/usr/bin/env bash
# The tests with the versions that a file in this folder names, in a venv of its own: run.sh FILE [options of pytest]
set -euo pipefail
file=$(realpath "$1")
shift
cd "$(dirname "$0")/../.."
python=python$(sed -n '1s/^# Python \([0-9.]*[0-9]\).*/\1/p' "$file")
if ! "$python" --version > /dev/null 2>&1; then  # a launcher of several versions may be there without this one
    echo "$(basename "$file"): $python is not installed; left out"
    exit
fi
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --constraint "$file" "torch>=2.13"
"$venv/bin/python" -m pip install --quiet --constraint "$file" --editable ".[dev]"
echo "$(basename "$file"): $("$python" --version)"
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q "$@"
