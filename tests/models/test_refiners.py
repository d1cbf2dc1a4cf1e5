"""What every refiner promises, whoever uses it."""

import pytest
import torch
from torch.testing import assert_close

from methods.toco import ToCo
from models.refiners.base import REFINERS, create_refiner, refiner_options
from tests.methods.demo import VIT

OPTIONS = {"attention_affinity": {"backbone": VIT}}
OWN = [name for name in REFINERS if name != "pydensecrf"]  # which needs a compiled program


def make(name):
    if name == "mask_vote":
        pytest.importorskip("skimage")
    return create_refiner(name, **OPTIONS.get(name, {}))


def two_stacks(b=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(b, 3, 20, 24, generator=generator)
    return image, [torch.rand(b, n, 20, 24, generator=generator).softmax(1) for n in (3, 2)]


@pytest.mark.parametrize("name", OWN)
def test_stacks_and_images_are_refined_independently(name):
    refiner, (image, stacks), (same, copies) = make(name), two_stacks(), two_stacks()
    together = refiner.refine_all(image, stacks)
    assert torch.equal(image, same) and all(map(torch.equal, stacks, copies))
    for stack, refined in zip(stacks, together, strict=True):
        assert refined.shape == stack.shape and refined.dtype == torch.float32 and not refined.requires_grad
        assert_close(refined, refiner.refine(image, stack), rtol=1e-4, atol=1e-5)
        assert_close(refined[1:], refiner.refine(image[1:], stack[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_equal_scores_stay_equal(name):
    refined = make(name).refine(two_stacks()[0], torch.full((2, 4, 20, 24), 0.25))
    assert_close(refined, refined[:, :1].expand_as(refined))


def test_names_mappings_and_import_paths():
    assert refiner_options("pamr", "par") == {"name": "pamr"}
    assert create_refiner(**refiner_options({"iterations": 3}, "par")).iterations == 3
    assert create_refiner("models.refiners.pixel_adaptive.PAR", iterations=2).iterations == 2
    with pytest.raises(ValueError, match="pamr"):
        create_refiner("pamrr")
    with pytest.raises(KeyError, match=r"method\.refiner"):
        create_refiner("par", key="method.refiner", dilation=1)


def test_a_method_takes_any_refiner():
    torch.manual_seed(0)
    method = ToCo(6, VIT, refiner={"name": "dense_crf", "preset": "toco_pseudo_label", "steps": 2})
    image, class_label = torch.randn(1, 3, 48, 48), torch.eye(5)[:1]
    label = method.decoder_target(image, method.predict(image, (1.0,)), class_label, 0)
    assert label.shape == (1, 48, 48) and set(label.unique().tolist()) <= {0, 1, 255}
