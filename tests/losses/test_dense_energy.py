"""Dense-energy loss: recorded values and gradients, and what they promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import losses.dense_energy
from losses.dense_energy import dense_energy_loss, gated_bilateral_energy
from tests.formula import formula_array
from tests.recorded import recorded
from utils.image import denormalize, normalize


def relative(value, expected):
    return float((value - expected).abs().max() / expected.abs().max())


@recorded("energy_*")
def test_loss_and_gradients_match_reference(case):
    images = case["images"].permute(0, 3, 1, 2)
    b, _, height, width = images.shape
    classes = len(case["grad_probs_sum_per_class"])
    shape = (1, classes, math.ceil(height / 16), math.ceil(width / 16))
    names = [f"{case['tag']}/{case.name}/logit{i}" for i in range(b)]
    coarse = torch.cat([torch.from_numpy(3 * formula_array(name, shape)) for name in names])
    logits = F.interpolate(coarse, (height, width), mode="bilinear").requires_grad_()
    label, box, every = case["labels"].long(), case["boxes"], int(case["stride"])
    loss = dense_energy_loss(denormalize(normalize(images)), logits, label, box)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.shape == ()
    assert relative(loss.detach(), case["loss_from_logits"]) < 1e-5
    assert relative(grad[:, :, ::every, ::every], case["grad_logits"]) < 1e-5
    assert relative(grad.double().abs().sum(), case["grad_logits_abs_sum"]) < 1e-5

    # The layer alone, with the gradient of the probabilities before they are shrunk.
    probs = logits.detach().softmax(1).requires_grad_()
    h, w = height // 2, width // 2
    rows = (torch.arange(h) * (height / h)).long()
    columns = (torch.arange(w) * (width / w)).long()
    small = F.interpolate(probs, (h, w), mode="bilinear", align_corners=False)
    y0, y1, x0, x1 = box.T[:, :, None]
    inside = ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None]
    image_rgb, unlabelled = images.float()[:, :, rows][..., columns], label[:, rows][..., columns] == 255
    loss = 1e-7 * gated_bilateral_energy(image_rgb, small, unlabelled, inside.float(), 15.0, 50.0)
    (grad,) = torch.autograd.grad(loss, probs)
    assert relative(loss.detach(), case["loss_from_probs"]) < 1e-5
    assert relative(grad[:, :, ::every, ::every], case["grad_probs"]) < 1e-5
    case.compare("grad_probs_sum_per_class", grad.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-12)


def random_inputs(batch=2, classes=4, height=20, width=26):
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(
        torch.rand(batch, 3, 4, 5, generator=generator) * 255, (height, width), mode="bilinear"
    )
    logits = torch.randn(batch, classes, height, width, generator=generator)
    label = torch.randint(0, classes, (batch, height, width), generator=generator)
    label[:, 5:9] = 255
    return image, logits, label


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_cuda_agree():
    image, logits, label = random_inputs()
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).detach().requires_grad_()
        loss = dense_energy_loss(image.to(device), x, label.to(device))
        results.append((loss.detach().cpu(), torch.autograd.grad(loss, x)[0].cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-12)


def test_only_pixels_in_the_box_have_a_gradient():
    image, logits, label = random_inputs()
    logits.requires_grad_()
    loss = dense_energy_loss(image, logits, label, torch.tensor([[4, 12, 6, 20], [0, 0, 0, 0]]))
    (grad,) = torch.autograd.grad(loss, logits)
    touched = grad.abs().sum(1) > 0
    assert touched[0, 4:12, 6:20].all()
    touched[0, 4:12, 6:20] = False
    assert not touched.any()


def test_batches_above_the_memory_budget_give_the_same(monkeypatch):
    image, logits, label = random_inputs(3)
    logits.requires_grad_()
    whole = torch.autograd.grad(dense_energy_loss(image, logits, label), logits)[0]
    monkeypatch.setattr(losses.dense_energy, "MAX_PIXELS", 2 * 10 * 13)
    parts, features = [], losses.dense_energy.bilateral_features
    monkeypatch.setattr(
        losses.dense_energy, "bilateral_features", lambda *a: parts.append(len(a[0])) or features(*a)
    )
    torch.testing.assert_close(torch.autograd.grad(dense_energy_loss(image, logits, label), logits)[0], whole)
    assert parts == [2, 1]
