"""Train on MS COCO 2014:  python scripts/train_coco.py config=configs/seco/coco.yaml train.steps=100"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launch import main

if __name__ == "__main__":
    main(default_config="configs/seco/coco.yaml", doc=__doc__)
