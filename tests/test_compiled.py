"""``train.compile=regions``: compiled parts give what they gave, and nobody needs a compiler."""

import torch
from torch.testing import assert_close

from methods.seco import SeCo
from ops.lattice import PermutohedralLattice, bilateral_features
from tests.methods.demo import demo_batch, demo_method
from utils.logging import collected_warnings
from utils.regions import compiled_regions

CPU = torch.device("cpu")


def test_compiled_parts_give_what_they_gave(at_length):
    """A block with its gradient, and at length PAR and the lattice, each a single graph."""
    method = demo_method(SeCo, refiner={"name": "par", "iterations": 2, "dilations": [1, 2]})
    tokens, image, scores = torch.randn(2, 5, 32), torch.rand(1, 3, 12, 14), torch.rand(1, 2, 12, 14)

    def parts():
        x = tokens.clone().requires_grad_()
        out = method.backbone.blocks[0](x)
        found = [out, *torch.autograd.grad(out.sum(), x)]
        if not at_length:
            return found
        lattice = PermutohedralLattice(bilateral_features(255 * image, 50.0, 15.0))
        filtered = lattice.filter(scores.flatten(2).transpose(1, 2))
        return [*found, method.refiner.refine(image, scores), filtered]

    expected = parts()
    with compiled_regions(method, CPU, backend="aot_eager", fullgraph=True):
        assert_close(parts(), expected, rtol=0, atol=1e-5)
    assert method.backbone.blocks[0]._compiled_call_impl is not None


def test_without_a_compiler_parts_stay_as_they_are(monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("no g++\nand more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    method = demo_method(SeCo)
    with collected_warnings() as found, compiled_regions(method, CPU):
        method(demo_batch(), 0)
    assert len(found) == 1 and "no g++" in found[0] and "more" not in found[0]
