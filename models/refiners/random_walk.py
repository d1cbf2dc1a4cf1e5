"""Random walk of CAM scores over pixel affinities (PSA, Ahn and Kwak, CVPR 2018; IRN, Ahn et al., CVPR 2019).

One step is a sum over the few neighbours within the radius. The authors square the (hw, hw) transition matrix
n times instead; 2 ** n steps are the same walk.

K classes, (h, w) pixels of the walked map, P directions and N sources of pixel pairs (ops/pairs.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.refiners.pixel_adaptive import propagate
from ops.pairs import PathPairs, PixelPairs
from utils.precision import full_precision


def transition_weights(
    affinity: Tensor, pairs: PixelPairs, size: tuple[int, int], beta: float
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The columns of the transition matrix: affinities (P, N) to the power ``beta``, scaled to sum to 1.

    Affinities are symmetric; a pixel has affinity 1 to itself and 0 to all that no pair connects it with.

    Returns:
        Weights (1 + 2P, h, w) that sum to 1 over the neighbours of every pixel, and the neighbours' offsets
        (dy, dx), the pixel itself first.
    """
    if beta <= 0:
        raise ValueError(f"beta of a random walk must be positive, got {beta}")
    reach = pairs.reach
    directions = [(dy, dx) for dy, dx in pairs.directions.tolist()]
    # Affinity of every pixel as a source; pixels that are none, along three borders, have 0.
    forward = F.pad(affinity.float().unflatten(-1, pairs.grid(size)), (reach, reach, 0, reach)) ** beta
    # The same seen from the destinations. What is rolled over a border is 0.
    backward = [f.roll(direction, (0, 1)) for f, direction in zip(forward, directions, strict=True)]
    weights = torch.cat([forward.new_ones(1, *size), forward, *(b[None] for b in backward)])
    offsets = [(0, 0), *directions, *((-dy, -dx) for dy, dx in directions)]
    return weights / weights.sum(0), offsets


@torch.no_grad()
def random_walk(scores: Tensor, affinity: Tensor, pairs: PixelPairs, beta: float, steps: int) -> Tensor:
    """Scores after ``steps`` steps of the random walk: every step averages over a pixel's neighbours.

    Args:
        scores: (K, h, w).
        affinity: (P, N) in [0, 1] of the pixel pairs of an (h, w) map.
        beta: exponent of the affinities; large ones make the walk stop at weak boundaries.
    """
    size = scores.shape[-2], scores.shape[-1]
    with full_precision(scores):
        weights, offsets = transition_weights(affinity, pairs, size, beta)
        return propagate(scores.float()[None], weights[None], offsets, steps)[0]


@torch.no_grad()
def propagate_to_edge(
    cam: Tensor, edge: Tensor, radius: int = 5, beta: float = 10, exp_times: int = 8
) -> Tensor:
    """Random walk that stops at boundaries (IRN section 4.2).

    The affinity of two pixels is one minus the strongest boundary on the path between them. The map is
    surrounded by boundary, as in the authors' program, so that pixels at its border take part.

    Args:
        cam: (K, h, w) in [0, 1]; boundary pixels start with their share 1 - edge.
        edge: (h, w) probability of a class boundary.
        radius: of the pixel pairs, in pixels of the map.
        beta: exponent of the affinities.
        exp_times: squarings of the transition matrix, 2 ** exp_times steps.
    """
    pairs = PathPairs(radius)
    border = (radius, radius, 0, radius)
    height, width = edge.shape
    walled = F.pad(edge.float(), border, value=1.0)
    affinity = 1 - pairs.path_max(walled)
    walked = random_walk(F.pad(cam * (1 - edge), border), affinity, pairs, beta, 2**exp_times)
    return walked[:, :height, radius : radius + width]
