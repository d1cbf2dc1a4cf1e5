"""Changes of colour and blur are torchvision's on Pillow's pictures, to the bit."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import datasets.colour
import utils.colour
from datasets.colour import change_picture
from datasets.transforms import ColourJitter
from utils.colour import GREY, LAST, blur, change_pictures, no_change


def picture(width, height, seed):
    random = np.random.default_rng(seed)
    noise = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC)


def test_turned_hues_of_all_colours(at_length):
    """At length of all 16.8 million, else of 1/125 of them."""
    levels = torch.arange(0, 256, 1 if at_length else 5, dtype=torch.uint8)
    for red in levels:
        colours = torch.cartesian_prod(red[None], levels, levels)
        expected = np.array(F.adjust_hue(Image.fromarray(colours[None].numpy()), 0.07))[0]
        assert np.array_equal(datasets.colour.turn_hue(colours.T.numpy(), 17).T, expected)
        turned = utils.colour.turn_hue(colours.T[None, :, :, None].float(), torch.full((1, 1, 1, 1), 17.0))
        assert np.array_equal(turned[0, :, :, 0].T.numpy(), expected)


@given(
    radius=st.floats(0.01, 2.0), width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 99)
)
@settings(max_examples=60)
def test_blur(radius, width, height, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = blur(torch.from_numpy(noise).permute(2, 0, 1)[None].float(), torch.tensor([radius]))
    expected = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(radius))
    assert torch.equal(found[0].byte(), F.pil_to_tensor(expected))


def test_pictures_with_changes_of_their_own(monkeypatch):
    """One by one on the CPU, in two bands, and in the pass of a GPU."""
    monkeypatch.setattr(datasets.colour, "BAND", 2000)
    expected, pictures, changes = [], [], []
    for seed in range(40):
        source = made = picture(61, 53, seed)
        change = no_change()
        if seed % 4:
            torch.manual_seed(seed)
            made, draw = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(source), torch.rand(())
            torch.manual_seed(seed)
            change = ColourJitter(0.4, 0.4, 0.4, 0.1).drawn()
            assert torch.rand(()) == draw
        if seed % 5 == 0:
            made, change[GREY] = F.rgb_to_grayscale(made, 3), torch.tensor([1.0, 0, 0])
        if seed % 3:
            change[LAST, 0] = 0.1 + 0.04 * seed
            made = made.filter(ImageFilter.GaussianBlur(0.1 + 0.04 * seed))
        if seed % 7 == 0:
            made, change[LAST, 1] = F.solarize(made, 128), 128
        expected.append(F.pil_to_tensor(made))
        pictures.append(F.pil_to_tensor(source))
        changes.append(change)
        assert torch.equal(change_picture(pictures[-1], change), expected[-1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures, changes = torch.stack(pictures).to(device), torch.stack(changes)
    assert torch.equal(change_pictures(pictures, changes).cpu(), torch.stack(expected))
    assert not len(change_pictures(pictures[:0], changes[:0]))


def test_a_mean_between_two_levels():
    half = torch.full((3, 448, 448), 77, dtype=torch.uint8)
    half[:, :224] = 78
    change = no_change()
    change[0] = torch.tensor([0.0, 1.0, 0.0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = change_pictures(half[None].to(device), change[None]).cpu()
    assert (found == 78).all() and torch.equal(found[0], change_picture(half, change))
