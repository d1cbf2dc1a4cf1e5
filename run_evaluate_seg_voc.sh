#!/usr/bin/env bash
# Segment and score a split of PASCAL VOC with one process per device:
#   bash run_evaluate_seg_voc.sh SCRIPT [GPUS] [PORT] [DEVICES] CHECKPOINT [flags and key=value ...]
#   bash run_evaluate_seg_voc.sh tools/infer_seg_voc.py 4 29501 0,1,2,3 logs/seco_voc/last.pth --infer val --crf
#   bash run_evaluate_seg_voc.sh tools/infer_seg_voc.py 2 29501 cpu logs/toco_mini/last.pth     # two processes (gloo)
#   bash run_evaluate_seg_voc.sh tools/infer_seg_voc.py 0,1 logs/seco_voc/last.pth              # DEVICES alone: 0, cpu or a list
# DEVICES "cpu" uses no GPU. All flags: python tools/infer_seg_voc.py --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; fi

script=$1; shift
[ -f "$script" ] || script=$here/$script
# The positions before the checkpoint are numbers, device lists or the word cpu; whatever else comes first is the checkpoint.
positional=()
while [ $# -gt 0 ] && [ ${#positional[@]} -lt 3 ] && [[ $1 =~ ^([0-9]+(,[0-9]+)*|cpu)$ ]] && [ ! -f "$1" ]; do positional+=("$1"); shift; done
if [ $# -gt 0 ] && [[ $1 != -* && $1 != *=* ]]; then set -- --model_path "$@"; fi
if [ ${#positional[@]} -eq 1 ] && [[ ${positional[0]} =~ ^(0|cpu|.*,.*)$ ]]; then
  commas=${positional[0]//[^,]/}
  positional=($(( ${#commas} + 1 )) "${MASTER_PORT:-29500}" "${positional[0]}")
fi
processes=${positional[0]:-1} port=${positional[1]:-${MASTER_PORT:-29500}} devices=${positional[2]:-}

source "$here/scripts/environment.sh"
check_positions
cd "$here"
use_python
case $PYTHON in .venv/*) PYTHON=$here/$PYTHON ;; esac
cd "$OLDPWD"
launch --device= "$script" "$@"
