#!/usr/bin/env bash
# Train with one process per device:
#   bash run_train.sh SCRIPT [GPUS] [PORT] [DEVICES] [RUN_NAME] [key=value ...]
#   bash run_train.sh scripts/train_voc.py 4 29501 0,1,2,3 my_run config=configs/seco/voc.yaml
#   bash run_train.sh scripts/train_voc.py 2 29501 cpu        # two processes on the CPU (gloo)
# Several nodes: set NNODES, NODE_RANK and MASTER_ADDR as for torchrun (docs/training.md); PORT may be MASTER_PORT.
set -euo pipefail
cd "$(dirname "$0")"
if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0; fi

script=$1; shift
positional=()
while [ $# -gt 0 ] && [ ${#positional[@]} -lt 4 ] && [[ $1 != *=* && $1 != -* ]]; do positional+=("$1"); shift; done
processes=${positional[0]:-1} port=${positional[1]:-${MASTER_PORT:-29500}} devices=${positional[2]:-} run_name=${positional[3]:-}

source scripts/environment.sh
check_positions
use_python
[ -z "$run_name" ] || set -- "$@" run_name="$run_name"
launch device= "$script" "$@"
