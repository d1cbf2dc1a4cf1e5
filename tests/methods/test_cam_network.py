"""The plain classification network."""

import torch

from methods.cam import CAMNetwork

DEMO = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48}


def test_it_learns_tags_and_localises_without_a_decoder():
    torch.manual_seed(0)
    method = CAMNetwork(4, DEMO)
    image, class_label = torch.randn(4, 3, 48, 48), torch.eye(4, 3)
    batch = {"image": image, "class_label": class_label}
    optimizer = torch.optim.AdamW([g | {"lr": 1e-3} for g in method.parameter_groups()])
    first = None
    for step in range(15):
        losses, _ = method(batch, step)
        total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
        first = first or total.item()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert set(losses) == {"cls", "cls_aux"} and total.item() < 0.6 * first
    prediction = method.predict(image, method.cam_scales)
    assert prediction.seg_logits is None and prediction.cam.shape == prediction.aux_cam.shape == (
        4,
        3,
        48,
        48,
    )
    assert all(parameter.grad is not None for parameter in method.parameters())
