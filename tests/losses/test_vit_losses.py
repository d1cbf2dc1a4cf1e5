"""Losses of the single-stage ViT methods."""

import pytest
import torch

from losses.affinity import patch_affinity_loss
from losses.classification import multilabel_loss
from losses.contrastive import class_token_contrast
from losses.segmentation import balanced_cross_entropy
from ops.labels import affinity_label
from tests.recorded import recorded


@recorded("vit_losses_toco", "vit_losses_seco")
def test_losses_match_reference_values_and_gradients(case):
    for tag in case.tags():
        if f"{tag}/ptc" in case:
            check_patch_affinity(case, tag)
        elif tag == "cls":
            logits = case.arr("cls/x", case["cls/y"].shape).requires_grad_()
            loss = multilabel_loss(logits, case["cls/y"])
            case.compare("cls/loss", loss)
            case.gradient("cls/grad", torch.autograd.grad(loss, logits)[0], ())
        else:
            check_segmentation(case, tag)


def check_patch_affinity(case, tag):
    b, quarter, h, w = case[f"{tag}/ptc_grad"].shape
    width = case.setting("width|channels|dim", quarter * 4, tag)
    tokens = case.arr(f"ptc/x_{tag}", (b, width, h, w)).requires_grad_()
    label = case.ints(f"ptc/lab_{tag}", (b, h, w), 5)
    label[label == 4] = 255
    label[label == 3] = 0
    loss = patch_affinity_loss(tokens, affinity_label(label))
    case.compare(f"{tag}/ptc", loss)
    case.gradient(f"{tag}/ptc_grad", torch.autograd.grad(loss, tokens)[0], (1, 4))


def check_segmentation(case, tag):
    default = (1, 21, 16, 16) if tag == "seg_nofg" else (2, 21, 24, 20)
    b, k, h, w = case.full_shape(f"{tag}/grad_sub", (1, 3, 3, 3), case.setting("shape", default, tag))
    logits = case.arr(f"seg/x_{tag}", (b, k, h, w)).requires_grad_()
    label = case.ints(f"seg/lab_{tag}", (b, h, w), k + 8)
    label[label >= k + 4] = 255
    label[(label >= k) & (label != 255)] = 0
    if tag.endswith("nofg"):
        label[(label != 0) & (label != 255)] = 255
    loss = balanced_cross_entropy(logits, label)
    case.compare(f"{tag}/loss", loss)
    case.gradient(f"{tag}/grad", torch.autograd.grad(loss, logits)[0], (1, 3, 3, 3), f"{tag}/grad_sub")


@pytest.mark.parametrize("value", [0, 3, 255])
def test_segmentation_is_finite_when_one_side_is_empty(value):
    logits = torch.randn(1, 5, 4, 4, requires_grad=True)
    loss = balanced_cross_entropy(logits, torch.full((1, 4, 4), value))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (loss == 0) == (value == 255)


@recorded("vit_ctc_loss")
def test_class_token_contrast_matches_reference_values_and_gradients(case):
    for tag in case.tags():
        flags = case[f"{tag}/flags"]
        b, views = flags.shape
        width = case.setting("width|dim|d", case[f"{tag}/grad"].shape[1] * 4, tag)
        student = (case.arr(f"ctc/s_{tag}", (views * b, width)) * 1.5 / width**0.5).requires_grad_()
        teacher = case.arr(f"ctc/t_{tag}", (2 * b, width)) * 1.5 / width**0.5
        loss = class_token_contrast(student, teacher, flags, float(case[f"{tag}/temp"]))
        case.compare(f"{tag}/loss", loss)
        case.gradient(f"{tag}/grad", torch.autograd.grad(loss, student)[0], (2, 4))


def test_class_token_contrast_survives_long_projections():
    student = (100 * torch.randn(20, 8)).requires_grad_()
    flags = torch.ones(2, 10)
    flags[0, 4:] = 0
    loss = class_token_contrast(student, 100 * torch.randn(4, 8), flags, 0.5)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
