#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Makes .venv on a fresh machine.
#   bash run_tests.sh [pytest arguments]          for example: bash run_tests.sh tests/losses -k ptc
#   bash run_tests.sh --all                       promises at length too: 100 kills, 300 steps, 1,000 batches
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
TEST_MODULES="pytest xdist hypothesis ruff mypy"
use_python -r requirements.txt pytest pytest-xdist hypothesis ruff mypy types-tqdm types-PyYAML
# One process per core with one thread each; the tests of a file share what they set up.
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
  "$PYTHON" -m mypy
  exec "$PYTHON" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder
fi
# pytest would take the folder of --golden-dir FOLDER for its root, so it gets --golden-dir=FOLDER.
[ "$1" != --golden-dir ] || set -- "--golden-dir=$2" "${@:3}"
exec "$PYTHON" -m pytest -q "$@"
