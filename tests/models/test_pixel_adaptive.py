"""Pixel-adaptive refinement."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models.refiners.pixel_adaptive import PAMR, PAR, neighbour_offsets, propagate
from tests.formula import stats
from tests.recorded import recorded


@recorded("vit_par")
def test_par_matches_reference_values(case):
    iterations = case.setting("iterations|num_iter|n_iter", 10)
    for tag in case.tags():
        b, m, h, w = case[f"{tag}/out"].shape
        coarse = case.arr(f"par/img_{tag}", (b, 3, h // 4, w // 4), 0, 1)
        image = 0.9 * F.interpolate(coarse, size=(h, w), mode="bilinear")
        image += 0.1 * case.arr(f"par/noise_{tag}", (b, 3, h, w), 0, 1)
        size = case.setting("mask_size|mask", (20, 15) if tag == "resize" else (h, w), tag)
        maps = case.arr(f"par/mask_{tag}", (b, m, *size), 0, 1).softmax(1)
        affinity = PAR().affinity(image)
        case.compare(f"{tag}/aff_sub", affinity[:, None, :, ::9, ::9], rtol=1e-4)
        case.compare(f"{tag}/aff_stats", stats(affinity), rtol=1e-4)
        case.compare(f"{tag}/out_iter1_sub", PAR(iterations=1).refine(image, maps)[:, :, ::3, ::3], rtol=1e-4)
        case.compare(f"{tag}/out", PAR(iterations=iterations).refine(image, maps), rtol=1e-4)


def test_constant_maps_only_grow():
    par = PAR(iterations=3, position_weight=0.01)
    refined = par.refine(torch.rand(1, 3, 20, 30), torch.full((1, 2, 20, 30), 0.5))
    assert_close(refined, torch.full_like(refined, 0.5 * 1.01**3))


def test_flat_image_averages_all_neighbours_equally():
    par = PAR(dilations=(1, 2), iterations=1, position_weight=0.0)
    affinity = par.affinity(torch.full((1, 3, 9, 9), 0.4))
    assert_close(affinity, torch.full_like(affinity, 1 / 16))


def test_a_step_in_colour_stops_the_flow():
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 1.0
    image += 0.01 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    maps = torch.zeros(1, 1, 32, 32)
    maps[..., :16] = 1.0
    refined = PAR(iterations=10, position_weight=0.01).refine(image, maps) / 1.01**10
    assert refined[..., :16].min() > 0.9 and refined[..., 16:].max() < 0.1


def test_propagation_moves_values_by_their_offset():
    offsets = neighbour_offsets((2,))
    affinity = torch.zeros(1, 8, 6, 6)
    affinity[:, offsets.index((0, 2))] = 1
    maps = torch.arange(36.0).view(1, 1, 6, 6)
    moved = propagate(maps, affinity, offsets, 1)
    assert_close(moved[..., :4], maps[..., 2:])
    assert_close(moved[..., 4:], maps[..., 5:].expand(-1, -1, -1, 2))


@recorded("wsfcn_pamr")
def test_pamr_matches_reference_values(case):
    for name in case.starting("out"):
        i = name.removeprefix("out")
        image, mask = case.input(f"image{i}"), case.input(f"mask{i}")
        pamr = PAMR(iterations=case.meta["inputs"][f"mask{i}"]["iterations"])
        case.compare(name, pamr.refine(image, mask), rtol=1e-4, atol=1e-5)
        if case.starting(f"std{i}"):
            case.compare(f"std{i}", pamr.local_spread(image)[:, :, None], rtol=1e-4)
            case.compare(f"weights{i}", pamr.affinity(image)[:, None], rtol=1e-4)


@pytest.mark.parametrize("image", [torch.full((1, 3, 20, 30), 0.4), torch.rand(1, 3, 20, 30)])
def test_pamr_keeps_constant_maps(image):
    maps = torch.full((1, 2, 20, 30), 0.5)
    assert_close(PAMR(iterations=3).refine(image, maps), maps)
