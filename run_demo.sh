#!/usr/bin/env bash
# From nothing to a trained network and its scores, on generated scenes, without a GPU or a download of data:
#   bash run_demo.sh                 set up (.venv, once), make data, train, score; then open logs/demo/report.html
#   bash run_demo.sh seed=1          arguments go to scripts/demo.py
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
use_python -r requirements.txt
exec "$PYTHON" scripts/demo.py "$@"
