"""Pixel-adaptive refinement."""

import torch
import torch.nn.functional as F

from models.refiners.pixel_adaptive import PAMR, PAR
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


def test_a_step_in_colour_stops_the_flow():
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 1.0
    image += 0.01 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    maps = torch.zeros(1, 1, 32, 32)
    maps[..., :16] = 1.0
    refined = PAR(iterations=10, position_weight=0.01).refine(image, maps) / 1.01**10
    assert refined[..., :16].min() > 0.9 and refined[..., 16:].max() < 0.1


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
