"""Losses and gradients of odd batches are finite: no class or all, constant or huge images, tiny boxes,
labels that ignore everything, one image, another size, half precision.

Four batches a method have all of it; ``bash run_tests.sh --all tests/faults`` draws 1,000.
"""

import pytest
import torch

from tests.methods.test_every_method import METHODS, build, total_of

CLASSES = 3


def fuzzed(seed, stride):
    """A batch with everything that any method reads, and whether it is computed in half precision."""
    g = torch.Generator().manual_seed(seed)

    def draw(n):
        return seed % n if seed < 4 else int(torch.randint(n, (), generator=g))

    b, side = (2, 1)[draw(4) == 3], (64, 48)[draw(4) == 2]
    image = torch.randn(b, 3, side, side, generator=g)
    image = (image, image.new_full(image.shape, 0.3), 100 * image, image.round())[draw(4)]
    tags = (torch.rand(b, CLASSES, generator=g) < 0.5).float()
    tags = (tags, torch.zeros_like(tags), torch.ones_like(tags))[draw(3)]
    y, x = torch.randint(side, (2,), generator=g).tolist()
    box = ((0, side, 0, side), (y, y + 1, x, x + 1), (0, side, 0, x))[draw(3)]
    label = torch.randint(CLASSES + 1, (b, side, side), generator=g)
    label = (label, torch.full_like(label, 255), torch.zeros_like(label))[draw(3)]
    batch = {
        "image": image, "strong_view": image.flip(-1), "global_view": image.flip(-2), "class_label": tags,
        "valid_box": torch.tensor(b * [box]), "pseudo_label": label[:, ::stride, ::stride],
        "sample_seed": seed + torch.arange(b), "index": torch.arange(b),
    }  # fmt: skip
    return batch, draw(3) == 0


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_of_any_batch_are_finite(name, at_length):
    method, source = build(name).train(), METHODS[name][3]
    for seed in range(1000 if at_length else 4):
        batch, half = fuzzed(seed, 1 if source == "tags" else source)
        method.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses, _ = method(batch, 10**6)
        total_of(method, losses).backward()
        broken = [key for key, x in losses.items() if not x.isfinite() or x.dtype != torch.float32]
        broken += [
            k for k, p in method.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        assert not broken, f"batch {seed}: {broken}"
