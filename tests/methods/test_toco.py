"""ToCo's training step: the authors' values, and that sharing forward passes costs nothing but time."""

import torch

from methods.toco import ToCo
from ops.cam import present_classes
from tests.methods.demo import demo_batch, demo_method


def test_box_of_the_affinity_loss_can_be_scaled():
    batch = demo_batch()
    batch["valid_box"][:] = torch.tensor([16, 48, 0, 48])
    cam, present = torch.zeros(3, 2, 48, 48), present_classes(batch["class_label"])
    program, paper = (
        demo_method(ToCo, follow=how).token_label(cam, present, batch["valid_box"], (6, 6))
        for how in ("program", "paper")
    )
    assert (program == 255).all()  # row 16 and below of a map of 6 rows
    assert (paper[:, :2] == 255).all() and (paper[:, 2:] == 0).all()
