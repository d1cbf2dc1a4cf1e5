"""Losses of the single-stage ViT methods."""

import pytest
import torch
from torch.testing import assert_close

from losses.affinity import patch_affinity_loss
from losses.classification import multilabel_loss
from losses.contrastive import class_token_contrast
from losses.segmentation import balanced_cross_entropy
from ops.cam import affinity_label
from tests.formula import stats

TIGHT = dict(rtol=1e-5, atol=1e-6)


def close_gradient(grad, expected, rtol=1e-4):
    assert_close(grad, expected, rtol=rtol, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("file", ["vit_losses_toco", "vit_losses_seco"])
@pytest.mark.parametrize("tag", ["a", "b"])
def test_patch_affinity_matches_reference_value_and_gradient(golden, file, tag):
    case = golden(file)
    b, quarter, h, w = case[f"{tag}/ptc_grad"].shape
    tokens = case.arr(f"ptc/x_{tag}", (b, quarter * 4, h, w)).requires_grad_()
    label = case.ints(f"ptc/lab_{tag}", (b, h, w), 5)
    label[label == 4] = 255
    label[label == 3] = 0
    loss = patch_affinity_loss(tokens, affinity_label(label))
    assert_close(loss, case[f"{tag}/ptc"], **TIGHT)
    (grad,) = torch.autograd.grad(loss, tokens)
    close_gradient(grad[:, ::4], case[f"{tag}/ptc_grad"])
    assert_close(stats(grad)[1:], case[f"{tag}/ptc_grad_stats"][1:], rtol=1e-4, atol=1e-6)


def test_ignored_pairs_have_no_gradient():
    tokens = torch.randn(1, 8, 3, 3, requires_grad=True)
    patch_affinity_loss(tokens, torch.full((1, 9, 9), 255)).backward()
    assert not tokens.grad.any()


@pytest.mark.parametrize(
    "file, tag, shape",
    [
        ("vit_losses_toco", "seg_a", (2, 21, 24, 20)),
        ("vit_losses_seco", "seg_a", (2, 21, 24, 20)),
        ("vit_losses_seco", "seg_nofg", (1, 21, 16, 16)),
    ],
)
def test_segmentation_matches_reference_value_and_gradient(golden, file, tag, shape):
    case = golden(file)
    b, k, h, w = case.full_shape(f"{tag}/grad_sub", (1, 3, 3, 3), shape)
    logits = case.arr(f"seg/x_{tag}", (b, k, h, w)).requires_grad_()
    label = case.ints(f"seg/lab_{tag}", (b, h, w), k + 8)
    label[label >= k + 4] = 255
    label[(label >= k) & (label != 255)] = 0
    if tag == "seg_nofg":
        label[(label != 0) & (label != 255)] = 255
    loss = balanced_cross_entropy(logits, label)
    assert_close(loss, case[f"{tag}/loss"], **TIGHT)
    (grad,) = torch.autograd.grad(loss, logits)
    close_gradient(grad[:, ::3, ::3, ::3], case[f"{tag}/grad_sub"])
    assert_close(stats(grad)[1:], case[f"{tag}/grad_stats"][1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0, 3, 255])
def test_segmentation_is_finite_when_one_side_is_empty(value):
    logits = torch.randn(1, 5, 4, 4, requires_grad=True)
    loss = balanced_cross_entropy(logits, torch.full((1, 4, 4), value))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (loss == 0) == (value == 255)


def test_classification_matches_reference_value_and_gradient(golden):
    case = golden("vit_losses_toco")
    logits = case.arr("cls/x", case["cls/y"].shape).requires_grad_()
    loss = multilabel_loss(logits, case["cls/y"])
    assert_close(loss, case["cls/loss"], **TIGHT)
    close_gradient(torch.autograd.grad(loss, logits)[0], case["cls/grad"])


def contrast_case(case, tag):
    flags = case[f"{tag}/flags"]
    b, views = flags.shape
    width = case[f"{tag}/grad"].shape[1] * 4
    student = case.arr(f"ctc/s_{tag}", (views * b, width)) * 1.5 / width**0.5
    teacher = case.arr(f"ctc/t_{tag}", (2 * b, width)) * 1.5 / width**0.5
    return student.requires_grad_(), teacher, flags, float(case[f"{tag}/temp"])


@pytest.mark.parametrize("tag", ["a", "b"])
def test_class_token_contrast_matches_reference_value_and_gradient(golden, tag):
    case = golden("vit_ctc_loss")
    student, *rest = contrast_case(case, tag)
    loss = class_token_contrast(student, *rest)
    assert_close(loss, case[f"{tag}/loss"], **TIGHT)
    (grad,) = torch.autograd.grad(loss, student)
    close_gradient(grad[::2, ::4], case[f"{tag}/grad"])
    assert_close(stats(grad)[1:], case[f"{tag}/grad_stats"][1:], rtol=1e-4, atol=1e-6)


def test_class_token_contrast_survives_long_projections():
    student = (100 * torch.randn(20, 8)).requires_grad_()
    flags = torch.ones(2, 10)
    flags[0, 4:] = 0
    loss = class_token_contrast(student, 100 * torch.randn(4, 8), flags, 0.5)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
