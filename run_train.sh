#!/usr/bin/env bash
# Train with one process per device:
#   bash run_train.sh SCRIPT [GPUS] [PORT] [DEVICES] [RUN_NAME] [key=value ...]
#   bash run_train.sh scripts/train_voc.py 4 29501 0,1,2,3 my_run config=configs/seco/voc.yaml
#   bash run_train.sh scripts/train_voc.py 2 29501 cpu        # two processes on the CPU (gloo)
# Several nodes: set NNODES, NODE_RANK and MASTER_ADDR as for torchrun (docs/training.md).
set -euo pipefail
cd "$(dirname "$0")"
if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0; fi

script=$1; shift
positional=()
while [ $# -gt 0 ] && [ ${#positional[@]} -lt 4 ] && [[ $1 != *=* && $1 != -* ]]; do positional+=("$1"); shift; done
processes=${positional[0]:-1} port=${positional[1]:-29500} devices=${positional[2]:-} run_name=${positional[3]:-}

fail() { echo "$1 (bash run_train.sh --help)" >&2; exit 2; }
[ -f "$script" ] || fail "there is no script '$script'"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "GPUS is a number of processes, not '$processes'"
[[ $port =~ ^[0-9]+$ ]] && [ "$port" -le 65535 ] || fail "PORT is a number up to 65535, not '$port'"
source scripts/environment.sh
use_python
if [ "$devices" = cpu ]; then
  set -- "$@" device=cpu
  export CUDA_VISIBLE_DEVICES=
elif [ -n "$devices" ]; then
  export CUDA_VISIBLE_DEVICES=$devices
fi
# GPUs were asked for: without them it is an error, not a run on the CPU.
if [ "$devices" != cpu ] && { [ -n "$devices" ] || [ "$processes" -gt 1 ]; }; then set -- device=cuda "$@"; fi
[ -z "$run_name" ] || set -- "$@" run_name="$run_name"
# torchrun gives every process one thread unless told otherwise: share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes ))}

exec "$PYTHON" scripts/torchrun.py --nproc_per_node="$processes" --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" "$script" "$@"
