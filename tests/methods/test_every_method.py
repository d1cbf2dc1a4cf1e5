"""What every method keeps: it learns, survives odd batches, and predicts what it promises."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from methods.affinitynet import AffinityNet
from methods.base import Predicts
from methods.cam import CAMNetwork, PooledCAMNetwork
from methods.irnet import IRNet
from methods.mcc import MCC
from methods.one_stage import CAMBaseline, OneStage
from methods.seam import SEAM
from methods.seco import SeCo
from methods.segmentor import Segmentor
from methods.toco import ToCo
from methods.weclip import WeCLIP
from methods.ws_fcn import WSFCN
from tests.clip import SMALL as CLIP
from tests.clip import TEXTS
from tests.methods.demo import FAST, OPTIONS, demo_batch, demo_method

VIT = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 64}
PYRAMID = VIT | {"pyramid": True}
CNN = {"name": "resnet38d", "width": 4}
DECODER = {"loss_weights": {"cls": 1.0, "mask": 1.0}, "width": 16, "context_dilations": (2, 3, 4)}
CORRELATION = {"branch_dims": (8, 8), "embed_dim": 16}
HEAD = {"head": "deeplab", "head_options": {"hidden": 16, "skip_dim": 8, "dilations": (1, 2)}}

FROZEN = {"width": 16, "depth": 1, "heads": 2, "radius": 2, "refiner": {"name": "par", "iterations": 2}}

# class, backbone, options; what it learns from: tags, or labels at a stride
METHODS = {
    "toco": (ToCo, VIT, FAST | OPTIONS[ToCo], "tags"),
    "mcc": (MCC, VIT, FAST | OPTIONS[MCC], "tags"),
    "seco": (SeCo, VIT, FAST | OPTIONS[SeCo], "tags"),
    "cam": (CAMNetwork, VIT, {}, "tags"),
    "pooled_cam": (PooledCAMNetwork, CNN, {"cam_size": "stride16"}, "tags"),
    "seam": (SEAM, CNN, CORRELATION, "tags"),
    "seam_vit": (SEAM, PYRAMID, CORRELATION | {"pooling": "max"}, "tags"),
    "one_stage": (OneStage, CNN, DECODER, "tags"),
    "one_stage_vit": (OneStage, PYRAMID, DECODER, "tags"),
    "baseline": (CAMBaseline, CNN, {}, "tags"),
    "ws_fcn": (WSFCN, PYRAMID, DECODER, "tags"),
    "affinity": (AffinityNet, CNN, {"branch_dims": (8, 8, 16)}, 8),
    "affinity_vit": (AffinityNet, PYRAMID, {"branch_dims": (8, 8, 16)}, 8),
    "irn": (IRNet, PYRAMID, {"radius": 4, "input_size": 64}, 1),
    "segmentor": (Segmentor, PYRAMID, HEAD, 1),
    "weclip": (WeCLIP, CLIP, TEXTS | FROZEN, "tags"),
}


def build(name):
    if name == "weclip":
        pytest.importorskip("open_clip")
    torch.manual_seed(0)
    target, backbone, options, _ = METHODS[name]
    method = target(4, backbone, **options)
    for module in method.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return method


def batch_of(name, size=64):
    """Two images of two classes that differ in colour, with tags and labels."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(2, size, size, dtype=torch.int64)
    label[0, :, size // 2 :], label[1, size // 2 :] = 1, 3
    label[:, :, size // 2 - 8 : size // 2] = 255
    image = torch.randn(2, 3, size, size, generator=generator) + (label % 255)[:, None]
    source = METHODS[name][3]
    if source == "tags":
        views = {"global_view": image.flip(0), "strong_view": image + 0.1}
        box, seeds = torch.tensor([[0, size, 0, size], [4, size - 8, 0, size]]), torch.arange(2)
        class_label = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
        return views | {"image": image, "class_label": class_label, "valid_box": box, "sample_seed": seeds}
    return {"image": image, "pseudo_label": label[:, ::source, ::source]}


def total_of(method, losses):
    return sum(method.loss_weight(name, 10**6) * loss for name, loss in losses.items())


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_a_batch_and_every_parameter_has_one_group(name):
    method, batch = build(name).train(), batch_of(name)
    groups = [{"params": group["params"]} for group in method.parameter_groups()]
    optimizer, history = torch.optim.AdamW(groups, lr=1e-2 if name == "seam" else 2e-3), []
    for _ in range(10):
        losses, _ = method(batch, 10**6)
        optimizer.zero_grad()
        total_of(method, losses).backward()
        optimizer.step()
        history.append(losses.get("cls", total_of(method, losses)).item())
    assert set(losses) == set(method.losses)
    assert min(history[-3:]) < 0.9 * history[0]
    trained = {id(p): p for p in method.parameters() if p.requires_grad}
    grouped = [id(p) for g in groups for p in g["params"] if p.requires_grad]
    assert sorted(grouped) == sorted(trained) and all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(METHODS[name][0], Predicts)])
def test_prediction_fits_image_and_classes(name):
    method, image = build(name).eval(), batch_of(name)["image"][:, :, :56]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method.predict(image, (1.0, 0.5))
    out, mirrored = method.predict(image, (1.0, 0.5)), method.predict(image.flip(-1), (1.0, 0.5))
    for cam in filter(lambda cam: cam is not None, (out.cam, out.aux_cam)):
        assert cam.shape == (2, 3, 56, 64) and cam.ge(0).all() and cam.le(1).all()
    assert out.class_logits.shape == (2, 3) and not out.class_logits.requires_grad
    bare = method.predict(image, ())
    assert bare.cam is None and bare.aux_cam is None
    assert_close(bare.class_logits, out.class_logits)
    if out.seg_logits is not None:
        assert_close(bare.seg_logits, out.seg_logits)
    if out.cam is not None:
        assert_close(mirrored.cam.flip(-1), out.cam, rtol=1e-3, atol=1e-4)
        assert half.cam.dtype == torch.float32


# -- methods with a contrast of class tokens


@pytest.mark.parametrize("kind", OPTIONS)
def test_steps_repeat_and_leave_the_random_state_alone(kind):
    batch, runs = demo_batch(), []
    for _ in range(2):
        method = demo_method(kind)
        before = torch.get_rng_state()
        runs.append([{k: v.item() for k, v in method(batch, step)[0].items()} for step in range(2)])
        assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", OPTIONS)
def test_teacher_moves_once_per_step(kind):
    method, batch = demo_method(kind, momentum=0.9), demo_batch()
    with torch.no_grad():
        method.proj_head.mlp[0].bias.add_(1.0)
    before = method.teacher_head.mlp[0].bias.clone()
    method(batch, 0)
    method(batch, 0)
    assert_close(method.teacher_head.mlp[0].bias, before + 0.1)


@pytest.mark.parametrize("kind", [ToCo, SeCo])
def test_no_image_is_encoded_twice_and_cam_passes_run_no_decoder(kind):
    method, encoded, decoded = demo_method(kind, cam_scales=(1.0, 0.5)), [], []
    method.backbone.register_forward_hook(lambda m, i, o: encoded.append(tuple(i[0].shape[::2])))
    method.decoder.register_forward_hook(lambda m, i, o: decoded.append(len(i[0])))
    method(demo_batch(), 0)
    # Main + second view; mirrored image; another scale of both; nine local crops.
    assert decoded == [3] and encoded == [(6, 48), (3, 48), (6, 24), (9, 24)]


@pytest.mark.parametrize(
    "kind, options, key_term",
    [
        (ToCo, {"label_source": "seg"}, "label_source"),
        (ToCo, {"decoder": None}, "decoder"),
        (MCC, {"mask_rate": 95}, "mask_rate"),
        (SeCo, {"local_crop_size": 48}, "3 crops of 48"),
        (OneStage, {"background": ("constant", 1.0)}, "background must"),
        (OneStage, {"backbone": CNN, "gate": 1.0}, "method.gate"),
        (OneStage, {}, "needs another backbone"),
        (SEAM, {"backbone": CNN, "branch_dims": (8, 8, 8)}, "branch_dims"),
        (CAMNetwork, {"num_classes": 1}, "includes the background"),
    ],
)
def test_a_wrong_option_is_named(kind, options, key_term):
    with pytest.raises(ValueError, match=key_term):
        if kind in OPTIONS:
            demo_method(kind, **options)(demo_batch(), 0)
        else:
            kind(**({"num_classes": 4, "backbone": VIT, "loss_weights": {"cls": 1.0}} | options))


def test_energy_term_appears_with_its_weight():
    weights = OPTIONS[ToCo]["loss_weights"] | {"reg": [[0, 0.0], [3, 0.05]]}
    method, batch = demo_method(ToCo, loss_weights=weights), demo_batch()
    assert method(batch, 2)[0]["reg"] == 0
    losses, _ = method(batch, 3)
    losses["reg"].backward()
    assert losses["reg"] < 0 and method.decoder.conv8.weight.grad.abs().sum() > 0
