"""Losses of 1-stage-wseg and WS-FCN: the authors' values, and what they promise for any input."""

import pytest
import torch
import torch.nn.functional as F

from losses.classification import multilabel_hinge_loss, multilabel_loss
from losses.segmentation import mask_loss
from tests.recorded import recorded
from utils.image import resize


@recorded("wsfcn_mask_loss", "onestage_mask_loss")
def test_mask_loss_matches_reference_values_and_gradient(case):
    logits, label = case.input("logits").requires_grad_(), case["labelmap"].long()
    resized = resize(logits, label.shape[-2:], align_corners=True)
    losses = mask_loss(resized, label, case["labels"])
    plain = F.cross_entropy(resized, label, ignore_index=255)  # what the balanced loss is a variant of
    (gradient,) = torch.autograd.grad(losses.mean(), logits)
    found = {"loss_per_image": losses, "loss": losses.mean(), "plain_ce": plain, "grad_logits": gradient}
    for name, value in found.items():
        case.compare(name, value, rtol=1e-5, atol=1e-7)


@recorded("wsfcn_cls_loss")
def test_class_losses_match_reference_values_and_gradients(case):
    for name, loss in (("soft_margin", multilabel_loss), ("hinge", multilabel_hinge_loss)):
        scores = case.input("scores").requires_grad_()
        value = loss(scores, case["labels"])
        case.compare(name, value, rtol=1e-5, atol=1e-7)
        case.compare(f"{name}_grad", torch.autograd.grad(value, scores)[0], rtol=1e-5, atol=1e-7)


def example(classes=3):
    """Logits, a label of background, class 1 and ignored pixels, and tags that agree."""
    torch.manual_seed(0)
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    label[:, 2:5, 2:5] = 1
    label[:, 6:] = 255
    tags = torch.zeros(2, classes)
    tags[:, 0] = 1
    return torch.randn(2, classes + 1, 8, 8), label, tags


def test_an_image_counts_only_if_every_tag_has_a_pixel():
    logits, label, tags = example()
    assert (mask_loss(logits, label, tags) > 0).all()
    tags[1, 2] = 1  # tagged, but nowhere in the label
    losses = mask_loss(logits, label, tags)
    assert losses[0] > 0 and losses[1] == 0
    label[0] = label[0].where(label[0] == 1, 255)  # no background
    assert mask_loss(logits, label, tags)[0] == 0


@pytest.mark.parametrize("value", [0, 255])
def test_one_class_or_none_is_finite(value):
    logits, label, tags = example()
    losses = mask_loss(logits.requires_grad_(), torch.full_like(label, value), torch.zeros_like(tags))
    losses.sum().backward()
    assert not losses.any() and not logits.grad.any()
