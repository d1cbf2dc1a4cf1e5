"""Data whose every pixel shows a class: no label and no prediction is background."""

import pytest
import torch

from engine.config.load import load_config
from engine.method import build_method
from engine.validation import predicted_image
from ops.cam import present_classes
from utils.image import denormalize

SMALL = ["data.background=false", "method.backbone.width=32", "method.backbone.depth=4"]


@pytest.mark.parametrize("name", ["toco", "mcc", "seco", "cam", "segmentor"])
def test_no_pixel_is_background(name):
    torch.manual_seed(0)
    method = build_method(load_config(f"configs/{name}/demo.yaml", SMALL), 7).eval()
    image, class_label = torch.randn(1, 3, 48, 48), torch.tensor([[1.0, 0, 0, 1, 0, 0]])
    out = method.predict(image, (1.0,))
    sample = {"image": image[0], "class_label": class_label[0]}
    labels = predicted_image(method, out, 0, sample).labels
    assert labels and all((label > 0).all() for label in labels.values())
    if "cam" in labels:
        assert set(labels["cam"].unique().tolist()) <= {1, 4}
    if hasattr(method, "pseudo_label"):
        present, box = present_classes(class_label), torch.tensor([[0, 48, 0, 40]])
        label = method.pseudo_label(denormalize(image), present.select(out.cam), present, box)
        assert set(label[..., :40].unique().tolist()) <= {1, 4} and (label[..., 40:] == 255).all()
        present = present_classes(torch.zeros_like(class_label))  # nothing is known of this image
        assert (method.pseudo_label(denormalize(image), present.select(out.cam), present, box) == 255).all()


def test_methods_built_on_background_refuse():
    with pytest.raises(ValueError, match=r"data\.background"):
        build_method(load_config("configs/one_stage/demo.yaml", SMALL), 7)
