"""Changes of colour are torchvision's on Pillow's pictures, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.colour import ColourJitter, to_grey, turn_hue


def test_turned_hues_of_all_colours(at_length):
    """At length of all 16.8 million, else of 1/125 of them."""
    levels = torch.arange(0, 256, 1 if at_length else 5, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels)
    expected = np.array(F.adjust_hue(Image.fromarray(colours[None].numpy()), 0.07))[0]
    assert np.array_equal(turn_hue(colours.T.numpy(), 17).T, expected)


@pytest.mark.parametrize("seed", range(6))
def test_jitter_and_grey(seed):
    random = np.random.default_rng(seed)
    noise = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    picture = noise.resize((160, 130), Image.Resampling.BICUBIC)  # two bands
    torch.manual_seed(seed)
    expected, draw = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(picture), torch.rand(())
    torch.manual_seed(seed)
    changed = ColourJitter(0.4, 0.4, 0.4, 0.1)(F.pil_to_tensor(picture))
    assert torch.equal(changed, F.pil_to_tensor(expected)) and torch.rand(()) == draw
    assert torch.equal(to_grey(changed), F.pil_to_tensor(F.rgb_to_grayscale(expected, 3)))
