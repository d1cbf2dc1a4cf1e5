"""The network of the last stage learns labels, whatever its backbone and head."""

import pytest
import torch

from losses.segmentation import pixel_cross_entropy
from methods.segmentor import HEADS, Segmentor

DEMO = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 32}
PYRAMID = {**DEMO, "pyramid": True}


def small(head="deeplab", backbone=PYRAMID, **options):
    torch.manual_seed(0)
    head_options = {"hidden": 16, "skip_dim": 8, "dilations": (1, 2)} if head == "deeplab" else None
    return Segmentor(4, backbone, head=head, head_options=head_options, **options)


def labelled_batch(size=(32, 40)):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, *size, generator=generator)
    mask = torch.zeros(2, *size, dtype=torch.int64)
    mask[0, 8:24, 8:30], mask[1, :, :20], mask[1, -4:] = 3, 1, 255
    image += mask.clamp(max=3)[:, None]
    return {"image": image, "pseudo_label": mask}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", [DEMO, PYRAMID], ids=["vit", "pyramid"])
def test_every_head_learns_a_batch(head, backbone):
    if head == "deeplab" and backbone is DEMO:
        with pytest.raises(ValueError, match=r"method\.backbone\.pyramid=true"):
            small(head, backbone)
        return
    method, batch = small(head, backbone), labelled_batch()
    optimizer = torch.optim.AdamW([g | {"lr": 2e-3} for g in method.parameter_groups()])
    losses = []
    for step in range(8):
        (loss,) = method(batch, step)[0].values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_ignored_pixels_have_no_gradient_and_do_not_count():
    logits = torch.randn(1, 3, 2, 4, requires_grad=True)
    label = torch.tensor([[[0, 1, 255, 255], [2, 255, 0, 1]]])
    loss = pixel_cross_entropy(logits, label)
    loss.backward()
    assert not logits.grad[:, :, label[0] == 255].any()
    expected = torch.nn.functional.cross_entropy(logits, label, ignore_index=255)
    torch.testing.assert_close(loss, expected)
