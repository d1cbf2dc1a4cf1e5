"""methods/clip_es.py: CAM and affinity in plain float64, and pseudo labels without training."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from engine.scores.records import read_scores
from methods.clip_es import ClipES
from models.refiners.attention_affinity import box_mask
from tests.checkpoints import demo_folder  # noqa: F401
from tests.clip import SMALL, TEXTS
from tests.stages import call
from tools import crf, infer_cam
from utils.cam_files import load_cam

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return ClipES(4, SMALL, **TEXTS).eval()


def test_cam_and_affinity_in_float64(method):
    """Gradients by finite differences of the softmax, then the equations of the paper one by one."""
    double = ClipES(4, SMALL, **TEXTS).eval()
    double.load_state_dict(method.state_dict())
    double.double()
    image, channels = torch.randn(1, 3, 16, 24), torch.tensor([0, 2])
    x, size = double.backbone.embed(image.double())
    sequences, maps = double.backbone.walk(x)
    last, before = double.backbone.blocks[-1], sequences[-2]

    def probability(normed):
        mixed = last.attn(normed, normed, normed)[0]
        y = before + mixed
        y = double.backbone.visual.ln_post(y + last.mlp(last.ln_2(y)))
        vector = y[0, 1:].mean(0) @ double.backbone.visual.proj
        logits = (
            double.backbone.logit_scale.exp() * double.text_vectors[[0, 2, 3, 4]] @ (vector / vector.norm())
        )
        return (logits.exp() / logits.exp().sum())[:2]

    normed = last.ln_1(before)
    generator = torch.Generator().manual_seed(0)
    found = double.grad_cam(before, size, channels)
    jacobian = torch.autograd.functional.jacobian(probability, normed)[:, 0]  # (2, 1 + N, D)
    for _ in range(3):  # autograd's Jacobian is that of finite differences
        step = torch.randn(normed.shape, generator=generator, dtype=torch.float64)
        numeric = (probability(normed + 1e-5 * step) - probability(normed - 1e-5 * step)) / 2e-5
        assert_close((jacobian * step).sum((1, 2)), numeric, rtol=1e-6, atol=1e-10)
    cam = [[max(float(jacobian[p, 1:].mean(0) @ normed[0, 1 + n]), 0) for n in range(6)] for p in range(2)]
    assert_close(found.flatten(2)[0], torch.tensor(cam, dtype=torch.float64), rtol=1e-9, atol=1e-14)

    w = np.mean([a[0, 1:, 1:].numpy() for a in maps], 0)
    for _ in range(3):
        w = w / w.sum(0, keepdims=True)
        w = w / w.sum(1, keepdims=True)
    w = (w + w.T) / 2
    w = w @ w
    stretched = lambda m: (m - m.min()) / (m.max() - m.min() + 1e-7)  # noqa: E731
    refined = []
    for one in np.array(cam):
        one = stretched(one)
        inside = box_mask(torch.from_numpy(one).view(1, 1, *size), 0.4).numpy().ravel()
        refined.append(stretched((w * inside) @ one))
    expected = torch.from_numpy(np.stack(refined)).view(1, 2, *size)
    tags = torch.tensor([[1.0, 0, 1]])
    cam = double.cams(double.encode(image.double()), tags)
    assert_close(cam[:, channels], expected, rtol=1e-7, atol=1e-9)
    cam = method.cams(method.encode(image), tags)
    assert_close(cam[:, channels], expected.float(), rtol=1e-3, atol=1e-4)


def test_only_tagged_classes_have_a_place_and_no_part_is_trained(method):
    image, tags = torch.randn(2, 3, 30, 21), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    made = method.predict_tagged(image, tags, (1.0, 0.5))
    assert made.cam.shape == (2, 3, 30, 21) and made.class_logits.shape == (2, 3)
    assert not made.cam[1].any() and not made.cam[0, 1].any() and made.cam[0, 0].max() > 0.99
    assert not any(p.requires_grad for p in method.parameters()) and method.backbone.texts is None
    assert method.predict(image, (1.0,)).cam.shape == (2, 3, 30, 21)


def test_pseudo_labels_without_training(demo_folder, tmp_path):  # noqa: F811
    words = "[boat, sheep, car, crab, penguin, mushroom]"
    config = tmp_path / "texts.yaml"
    config.write_text(
        f"base: datasets/demo.yaml\ndata: {{root: {demo_folder}}}\n"
        f"method: {{target: methods.clip_es.ClipES, words: {words}, "
        f"background_words: [sky, road], cam_scales: [1.0], backbone: {SMALL}}}\n"
    )
    quiet = {"device": "cpu", "num_workers": 0, "infer": "test", "size": "native"}
    call(infer_cam, {"model_path": config, "out": tmp_path / "cam", **quiet})
    assert read_scores(tmp_path / "cam")[0]["protocol"].startswith("cam/test/ss+flip")
    files = sorted((tmp_path / "cam").glob("*.npz"))
    assert len(files) == 6 and all(len(load_cam(f).class_ids) == len(load_cam(f).cam) for f in files)
    images = {"images": demo_folder / "JPEGImages", "out": tmp_path / "labels"}
    call(crf, {"input": tmp_path / "cam", "recipe": "clip_es", "steps": 1, "processes": 0, **images})
    assert len(list((tmp_path / "labels").glob("*.png"))) == 6
