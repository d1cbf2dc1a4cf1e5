"""Fixtures that tests of inference share: checkpoints of small networks, ours and in the authors' names."""

import pytest
import torch

from datasets.demo.scene import SceneOptions
from datasets.demo.write import write_dataset
from engine.config.load import load_config, to_plain
from engine.method import build_method
from methods.vit_base import SingleStageViT
from utils.weights import save_checkpoint


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The demo data with 4 training and 6 test images of 48 pixels."""
    root = tmp_path_factory.mktemp("demo_set")
    write_dataset(root, SceneOptions(train=4, test=6, image_size=48), workers=1)
    return root


@pytest.fixture(scope="session")
def checkpoint(demo_folder, tmp_path_factory):
    """A checkpoint of ToCo with a small untrained network on the demo data, at step 7."""
    cfg = load_config(
        "configs/toco/demo.yaml",
        [
            f"data.root={demo_folder}", "eval.size=48", "infer.scales=[1.0,0.75]",
            "method.cam_scales=[1.0,0.5]", "method.background_threshold=0.5",
            "method.backbone.width=32", "method.backbone.depth=4", "method.backbone.heads=2",
        ],
    )  # fmt: skip
    torch.manual_seed(0)
    method = build_method(cfg, 7)
    names = (demo_folder / "class_names.txt").read_text().split()
    names = names if names[0] == "background" else ["background", *names]
    path = tmp_path_factory.mktemp("run") / "last.pth"
    state = {"model": method.state_dict(), "config": to_plain(cfg), "class_names": names, "step": 7}
    save_checkpoint(path, state)
    return path


@pytest.fixture(scope="session")
def published_toco(tmp_path_factory):
    """``published_toco(num_classes)``: a checkpoint in the authors' names, an image, and its logits."""

    def make(num_classes):
        torch.manual_seed(num_classes)
        method = SingleStageViT(num_classes, {"name": "deit_tiny_patch16_224", "pretrained": None}).eval()
        own = method.state_dict()
        state = {"module." + key.replace("backbone.", "encoder.", 1): value for key, value in own.items()}
        state["module.proj_head.last_layer.weight_g"] = torch.ones(8, 1)
        path = tmp_path_factory.mktemp("published") / "model_iter_20000.pth"
        torch.save(state, path)
        image = torch.randn(1, 3, 48, 64)
        return path, image, method.predict(image, ()).seg_logits

    return make
