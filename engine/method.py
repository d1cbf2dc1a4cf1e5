"""From the ``method`` section of a config to a method."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine.config.load import project_path, to_plain
from methods.base import Method
from utils.build import build, import_class


def build_method(cfg: DictConfig | Mapping[str, Any], num_classes: int, pretrained: bool = True) -> Method:
    """The method of a config; without ``pretrained`` no weight file is read (a checkpoint follows).

    Options of the backbone that are null are left out, so that a config can undo what its base sets.
    """
    spec = to_plain(OmegaConf.create(cfg["method"]))
    backbone = spec.get("backbone")
    if isinstance(backbone, dict):
        weights = backbone.get("pretrained") if pretrained else None
        backbone = spec["backbone"] = {key: value for key, value in backbone.items() if value is not None}
        if not pretrained:
            backbone.pop("weights", None)  # of open_clip
        backbone["pretrained"] = weights if weights in (None, "timm") else str(project_path(weights))
    import_class(spec["target"], Method)
    method: Method = build(spec, num_classes=num_classes)
    if cfg.get("data", {}).get("background") is False:
        method.drop_background()
    return method
