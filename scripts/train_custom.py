"""Train on images of your own:  python scripts/train_custom.py config=configs/seco/custom.yaml"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launch import main

if __name__ == "__main__":
    main(default_config="configs/seco/custom.yaml", doc=__doc__)
