"""Random walks over pixel affinities, against the dense transition matrices that they replace."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from methods.irnet import walked_scores
from models.refiners.random_walk import propagate_to_edge, random_walk
from ops.pairs import PathPairs, PixelPairs
from tests.recorded import recorded


def dense_affinity(affinity, pairs, size):
    """(hw, hw) of pair affinities (P, N), symmetric, 1 on the diagonal."""
    src, dst = pairs.indices(size)
    dense = torch.eye(size[0] * size[1])
    dense[src.expand_as(dst), dst] = affinity
    dense[dst, src.expand_as(dst)] = affinity
    return dense


def dense_transition(dense, beta, exp_times):
    """Columns that sum to one, squared ``exp_times`` times, as in the authors' programs."""
    transition = dense**beta
    transition = transition / transition.sum(0, keepdim=True)
    for _ in range(exp_times):
        transition = transition @ transition
    return transition


def random_inputs(pairs, size, k=3):
    generator = torch.Generator().manual_seed(0)
    rows, columns = pairs.grid(size)
    affinity = torch.rand(len(pairs.directions), rows * columns, generator=generator)
    return torch.rand(k, *size, generator=generator), affinity


@pytest.mark.parametrize("pairs", [PixelPairs(5), PathPairs(3), PixelPairs(1)])
@pytest.mark.parametrize("beta, exp_times", [(8, 8), (1.5, 0), (4, 3)])
def test_walk_equals_squaring_of_the_dense_matrix(pairs, beta, exp_times):
    size = (11, 13)
    scores, affinity = random_inputs(pairs, size)
    transition = dense_transition(dense_affinity(affinity, pairs, size), beta, exp_times)
    expected = (scores.flatten(1) @ transition).view_as(scores)
    found = random_walk(scores, affinity, pairs, beta, 2**exp_times)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@recorded("ms_propagate_to_edge")
def test_walk_to_edges_matches_reference_values(case):
    cam, edge = case.input("cam"), case.input("edge")[0] ** case.setting("edge_power", 2)
    walked = propagate_to_edge(cam, edge)
    case.compare("rw_default", walked[:, None], rtol=1e-4, atol=1e-4)
    case.compare("rw_b4e2", propagate_to_edge(cam, edge, beta=4, exp_times=2)[:, None], atol=1e-5)
    case.compare("rw_r3", propagate_to_edge(cam, edge, radius=3, beta=2, exp_times=1)[:, None], atol=1e-5)

    pairs, (h, w) = PathPairs(5), edge.shape
    affinity = 1 - pairs.path_max(F.pad(edge, (5, 5, 0, 5), value=1.0))
    case.compare("sparse_affinity", affinity[None], atol=1e-5)
    padded = (h + 5, w + 10)
    inside = torch.arange(padded[0] * padded[1]).view(padded)[:h, 5 : 5 + w].flatten()
    dense = dense_affinity(affinity, pairs, padded)[inside][:, inside]
    case.compare("dense_affinity", dense, atol=1e-5)
    # Walking from every pixel at once writes the rows of the transition matrix.
    everywhere = torch.zeros(h * w, *padded)
    everywhere[:, :h, 5 : 5 + w] = torch.eye(h * w).view(-1, h, w)
    for name in case.starting("transition_"):
        beta, exponent = map(int, re.findall(r"\d+", name))
        transition = random_walk(everywhere, affinity, pairs, beta, 2**exponent)
        tolerance = 1e-4 if exponent else 1e-5
        case.compare(name, transition[:, :h, 5 : 5 + w].flatten(1), rtol=tolerance, atol=tolerance)

    size = (4 * h - case.noted(r"4h-(\d+)", 3), 4 * w - case.noted(r"4w-(\d+)", 2))
    keys = torch.tensor(json.loads(case.noted(r"keys=(\[[\d, ]+\])", "[0, 2, 7, 15]")))
    for name in case.starting("label"):
        threshold = int(name.removeprefix("label_bg") or 0) / 100 if name != "label" else 0.25
        scores = walked_scores(walked, size, threshold)
        case.same(name, keys[scores.argmax(0)], differing=0.001)
    up = scores[1:]
    step = [-(-side // part) for side, part in zip(size, case["up"].shape[1:])]
    up, expected = up[:, :: step[0], :: step[1]], case["up"]
    assert_close(up / up.max(), expected / expected.max(), rtol=1e-4, atol=1e-4)
