#!/usr/bin/env bash
# Segment and score a split of MS COCO with one process per device:
#   bash run_evaluate_seg_coco.sh SCRIPT [GPUS] [PORT] [DEVICES] CHECKPOINT [flags and key=value ...]
#   bash run_evaluate_seg_coco.sh tools/infer_seg_coco.py 4 29501 0,1,2,3 logs/seco_coco/last.pth --infer val_part
# DEVICES "cpu" uses no GPU. All flags: python tools/infer_seg_coco.py --help
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0; fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_evaluate_seg_voc.sh" "$@"
