"""WS-FCN's decoder: the authors' values, and what holds for any input."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from methods.ws_fcn import ConsistentFusion, ContextAggregation, FlowAlignment, sample_corners
from tests.methods.single_stage import author_names, check_block
from tests.recorded import recorded

NAMES = author_names("wsfcn")


@recorded("wsfcn_fca")
def test_context_aggregation_matches_reference_values_and_gradients(case):
    make, x = partial(ContextAggregation, width=256), case.input("x")
    block = check_block(case, make, ("x",), NAMES, "context")
    for i, branch in enumerate(block.branches, start=1):
        with torch.no_grad():
            features = branch(x)
            case.compare(f"branch{i}", features, rtol=1e-4, atol=1e-5)
            attention = block.channel_attention(features).flatten(1)
        case.compare(f"ca{i}", attention, rtol=1e-4, atol=1e-5)


@recorded("wsfcn_align")
def test_alignment_matches_reference_values_and_gradients(case):
    block = check_block(case, FlowAlignment, ("low", "deep"), NAMES, "alignment")
    case.compare("flow", block.flow_field(case.input("low"), case.input("deep")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reach", [1.0, 1.6])
def test_sampling_by_indices_equals_grid_sample(reach):
    """Also outside of the map, and on its places and border, where the gradient to a place has two sides."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    place = reach * (2 * torch.rand(2, 6, 7, 2, generator=generator, dtype=torch.float64) - 1)
    place[:, 0, :2] = torch.tensor([[-1.0, -1.0], [1.0, 0.5]])
    results = []
    for sample in (sample_corners, lambda *x: F.grid_sample(*x, align_corners=True)):
        inputs = [x.clone().requires_grad_() for x in (maps, place)]
        out = sample(*inputs)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((weight * out).sum(), inputs)))
    for ours, theirs in zip(*results):
        assert_close(ours, theirs)


def test_alignment_samples_deterministically_where_asked_to(monkeypatch):
    torch.manual_seed(0)
    block, shallow, deep = FlowAlignment(4, 6), torch.randn(2, 4, 12, 9), torch.randn(2, 6, 6, 5)
    expected = block(shallow, deep)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(F, "grid_sample", None)
    assert_close(block(shallow, deep), expected, rtol=1e-4, atol=1e-5)


def test_alignment_of_a_graph_is_the_same_down_to_one_column(monkeypatch):
    torch.manual_seed(0)
    block, shallow, deep = FlowAlignment(4, 6), torch.randn(2, 4, 5, 1), torch.randn(2, 6, 3, 1)
    expected = block(shallow, deep)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(block(shallow, deep), expected)


@recorded("wsfcn_sf2")
def test_fusion_matches_reference_values_and_gradients(case):
    block = check_block(case, ConsistentFusion, ("left", "down"), NAMES, "fusion", ("", "_train"))
    norm = block.deep[3][1]
    case.compare("running_mean_bn4v_after", norm.running_mean, rtol=1e-4, atol=1e-5)
    case.compare("running_var_bn4v_after", norm.running_var, rtol=1e-4, atol=1e-5)
