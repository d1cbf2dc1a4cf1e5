"""A trained network from another project, with this folder as the repository:

model = torch.hub.load("path/to/tag2mask", "tag2mask", "last.pth", source="local")
masks = model.predict("photo.jpg")      # masks.label, .names, .area, .score, .cam
"""

import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "omegaconf", "safetensors"]
# torch.hub takes the folder off the path again, but modules that are imported later need it.
sys.path.append(str(Path(__file__).resolve().parent))

from engine.predictor import tag2mask  # noqa: F401
