"""Segment MS COCO: python tools/infer_seg_coco.py --model_path CKPT [--infer val_part|val|LIST] [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.infer_seg import main

if __name__ == "__main__":
    main(num_classes=81, other="tools/infer_seg_voc.py for PASCAL VOC, tools/infer_seg.py for other data")
