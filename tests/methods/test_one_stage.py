"""1-stage-wseg, its baseline and what WS-FCN inherits: the authors' values, and what holds for any input."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from losses.segmentation import mask_loss
from methods.one_stage import (
    AtrousPyramid,
    CAMBaseline,
    GlobalCueInjection,
    OneStage,
    StochasticGate,
    confident_label,
    focal_penalty,
    mean_foreground,
    weighted_pooling,
)
from methods.ws_fcn import WSFCN
from models.blocks import FixedStatisticsNorm
from tests.methods.single_stage import (
    all_classes,
    author_names,
    check_block,
    normalized,
    small_batch,
    small_method,
)
from tests.recorded import recorded
from utils.image import resize

NAMES = author_names("onestage")


# -- parts


@recorded("onestage_gci")
def test_cue_injection_matches_reference_values_and_gradients(case):
    check_block(case, GlobalCueInjection, ("shallow", "deep"), NAMES, "cue_injection", ("", "_train"))


@recorded("onestage_aspp")
def test_atrous_pyramid_matches_reference_values_and_gradients(case):
    check_block(case, partial(AtrousPyramid, width=256), ("x",), NAMES, "context")


@recorded("wsfcn_gate")
def test_gate_matches_reference_values(case):
    deep, shallow = case.input("deep"), case.input("shallow")
    for key in case:
        mode, psi = key.split("_")
        gate = StochasticGate(float(psi)).train(mode == "train")
        gate.keep_mask = lambda deep, psi=float(psi): case.input("mask_u") >= psi
        case.compare(key, gate(deep, shallow), rtol=1e-5, atol=1e-6)


def head_case(case):
    """Logits (B, K, h, w) whose foreground is a leaf, and the normalised image."""
    labels = case["labels"]
    noise, region = case.input("foreground_noise"), case.input("region")
    low, gain = case.noted(r"normal - ([\d.]+)", 3.0), case.noted(r"plus ([\d.]+) where", 7.0)
    inside = region > case.noted(r"region\[b,k\] > ([\d.]+)", 0.6)
    # One label of an image stays low.
    image = case.noted(r"label of image (\d+)", 2)
    place = ("first", "second", "third").index(case.noted(r"the (\w+) label of image", "third"))
    raised = labels.clone()
    raised[image, labels[image].nonzero()[place]] = 0
    foreground = (noise - low + gain * inside * raised[:, :, None, None]).requires_grad_()
    logits = torch.cat([torch.ones_like(foreground[:, :1]), foreground], 1)
    return foreground, logits, normalized(case.input("raw_image"))


@recorded("wsfcn_head", "onestage_head")
def test_everything_behind_the_logits_matches_reference_values(case):
    foreground, logits, image = head_case(case)
    labels, close = case["labels"], {"rtol": 1e-4, "atol": 1e-5}
    masks = logits.softmax(1)
    case.compare("ngwp", weighted_pooling(logits, masks)[:, 1:], **close)
    case.compare("focal", focal_penalty(masks, 3.0, 0.01)[:, 1:], **close)
    for key in case.starting("focal_p"):
        power, floor = key.removeprefix("focal_p").split("_l")
        case.compare(key, focal_penalty(masks, float(power), float(floor))[:, 1:], **close)
    case.compare("cls_fg", mean_foreground(masks, labels), **close)

    method = small_method(OneStage, labels.shape[1] + 1)
    method.network = lambda image: logits
    with torch.no_grad():
        test = method.eval().read(image)
    for name in ("cls", "test_cls"):
        case.compare(name, test.class_logits, **close)
    case.compare("test_masks", test.masks, **close)
    cam = resize(masks.detach(), image.shape[-2:], align_corners=True)
    cam[:, 1:] *= labels[:, :, None, None]
    case.compare("cam", cam, **close)
    case.compare("dec", all_classes(method, image, masks, labels), **close)
    pseudo_label = method.pseudo_ground_truth(image, masks, labels)
    case.same("pseudo_labelmap", pseudo_label, differing=0.002)

    batch = {"image": image, "class_label": labels}
    losses, metrics = method.train()(batch, step=10**6)
    assert set(losses) == {"cls", "mask"} and losses["mask"] > 0 and method(batch, step=0)[0]["mask"] == 0
    assert set(metrics) == {"fg"}
    per_image = mask_loss(resize(logits, image.shape[-2:], align_corners=True), pseudo_label, labels)
    case.compare("loss_mask_per_image", per_image, **close)
    totals = {"cls": losses["cls"], "mask": losses["mask"], "main": losses["cls"] + losses["mask"]}
    for name, total in totals.items():
        case.compare(f"loss_{name}", total, **close)
        gradient = torch.autograd.grad(total, foreground, retain_graph=True)[0]
        case.compare(f"grad_loss_{name}", gradient, rtol=1e-3, atol=1e-7)
    case.compare("loss_pretrain", method(batch, step=0)[0]["cls"], **close)


@recorded("wsfcn_pseudo_gt")
def test_confident_pixels_match_reference_values(case):
    masks = case.input("logits").softmax(1)
    masks[:, 1:] *= case["labels"][:, :, None, None]
    class_ids = torch.arange(masks.shape[1]).expand(len(masks), -1)
    factor = {"fg factor": 0.6, "bg": 0.7, "floor": 0.2}
    factor = {name: case.noted(rf"voc: [^;]*{name} ([\d.]*\d)", value) for name, value in factor.items()}
    for key in case.starting("labelmap_"):
        variant = key.removeprefix("labelmap_")  # voc, or what differs from it: low01, top04
        changed = {"low": "floor", "top": "fg factor"}.get(variant[:3])
        foreground, background, floor = (
            factor | ({changed: int(variant[3:]) / 10} if changed else {})
        ).values()
        label = confident_label(masks, class_ids, foreground, background, floor)
        case.same(key, label, differing=0.001)
        counts = torch.stack([torch.bincount(x[x != 255], minlength=masks.shape[1]) for x in label])
        assert (counts - case[f"counts_{variant}"]).abs().sum() <= 0.001 * label.numel()


# -- any input


METHODS = [OneStage, CAMBaseline, WSFCN]


@pytest.mark.parametrize("method_class", METHODS)
def test_training_mode_is_returned_and_fixed_statistics_stay(method_class):
    method = small_method(method_class, 4)
    assert method.train() is method and method.eval() is method and method.train().training
    fixed = {
        name: value.clone()
        for part, module in method.named_modules()
        if isinstance(module, FixedStatisticsNorm)
        for name, value in module.named_buffers(part)
    }
    assert bool(fixed) == (method_class is not CAMBaseline)
    method(small_batch(4), 0)
    buffers = dict(method.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in fixed.items())


def test_classes_without_confidence_are_removed():
    method = small_method(OneStage, 4, class_threshold=0.5, background=("score", 0.3))
    scores, views = torch.rand(1, 4, 5, 5), torch.tensor([[[-1.0, 2.0, -1.0], [-2.0, -1.0, 0.1]]])
    assert method.present(views).tolist() == [[[False, True, False], [False, False, True]]]
    finished = method.finish_scores(scores, views)
    assert not finished[:, 1].any() and (finished[:, 0] == 0.3).all()
    assert_close(finished[:, 2:], scores[:, 2:])
    told = method.finish_scores(scores, views, torch.tensor([[1.0, 0.0, 0.0]]))
    assert_close(told[:, 1], scores[:, 1])
    assert not told[:, 2:].any()
