"""Segment PASCAL VOC: python tools/infer_seg_voc.py --model_path CKPT [--infer val|test|LIST] [--help]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.infer_seg import main

if __name__ == "__main__":
    main(num_classes=21, other="tools/infer_seg_coco.py for MS COCO, tools/infer_seg.py for other data")
