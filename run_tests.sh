#!/usr/bin/env bash
# Everything that must hold before a change lands: style, types, tests. Makes .venv on a fresh machine.
#   bash run_tests.sh [pytest arguments]          for example: bash run_tests.sh tests/losses -k ptc
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
use_python -r requirements.txt pytest ruff mypy types-tqdm types-PyYAML
if [ $# -eq 0 ]; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m mypy
fi
exec "$PYTHON" -m pytest -q "$@"
