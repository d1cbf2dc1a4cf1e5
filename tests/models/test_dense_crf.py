"""DenseCRF against recorded pydensecrf results, and properties that hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models.refiners import dense_crf
from models.refiners.base import create_refiner
from models.refiners.crf_columns import Columns
from models.refiners.dense_crf import DenseCRF, energy_of_labels, energy_of_probs
from tests.formula import formula_array
from tests.recorded import recorded

SETS = {"seg": "toco", "cam": "toco_pseudo_label", "soft": "psa", "label": "irn"}


def photo(image):
    """(1, 3, H, W) in [0, 1] of recorded pixels (H, W, 3) in 0..255."""
    return image.permute(2, 0, 1)[None] / 255


def infer(crf, image, energy):
    """Probabilities (L, H, W) of one image from energies of the same shape."""
    return crf.refine_energies(image, [energy[None]])[0][0]


def close(q, expected, tolerance=2e-5):
    """Largest difference within tolerance, and the same winner wherever it is clear."""
    torch.testing.assert_close(q, expected, rtol=0, atol=tolerance)
    best = expected.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    assert torch.equal(q.argmax(0)[clear], expected.argmax(0)[clear])


@recorded("crf_softmax_*")
def test_probabilities_match_reference(case):
    case.irrelevant("tag")
    for key in case.starting("q_"):
        _, parameters, steps = key.split("_")
        crf = DenseCRF(SETS[parameters], steps=int(steps))
        close(crf.refine(photo(case["image"]), case["prob"][None])[0], case[key])


@recorded("wsfcn_crf", "onestage_crf")
def test_presets_of_the_single_stage_cnns_match_reference(case):
    scores = case.input("logits").softmax(0)
    scores[1:] *= case["labels"][:, None, None]
    power = case.noted(r"\*\*(\d+) \(onestage\)", 3)
    if case.name == "wsfcn_crf":
        before = torch.cat(
            [torch.full_like(scores[:1], case.noted(r"background ([\d.]+\d)", 0.25)), scores[1:]]
        )
        # The background of its unary is what the foreground leaves.
        preset, scores[0] = "ws_fcn", (1 - scores[1:].amax(0)) ** 5
    else:
        preset, scores[0] = "one_stage", scores[0] ** power
        before = scores
    case.same("argmax_before", before.argmax(0), differing=0.002)
    image = (255 * case.input("image")).floor()[None] / 255
    q = DenseCRF(preset).refine(image, scores[None])[0]
    case.compare("q", q, rtol=1e-3, atol=1e-4)
    case.same("argmax", q.argmax(0), differing=0.002)


@recorded("crf_kernels")
def test_single_kernels_and_normalizations_match_reference(case, monkeypatch):
    case.irrelevant("tag")
    image, unary = photo(case["image"]), case["unary"].view_as(case["prob"])
    torch.testing.assert_close(energy_of_probs(case["prob"]), unary, rtol=0, atol=2e-6)

    def run(steps=3, **changes):
        return infer(DenseCRF("psa", steps=steps, **changes), image, unary)

    close(run(bilateral_compat=0), case["q_gauss_only_3"])
    close(run(gaussian_compat=0), case["q_bilat_only_3"])
    close(run(0), case["q_zero_iterations"])
    close(run(), case["q_symmetric_3"])
    # No published program uses the other normalisations, which are here as a test of the unnormalised filter.
    for name in ("none", "before", "after"):

        def normalized(lattice, weight, name=name):
            ones = torch.ones(lattice.batch, lattice.points_per_image, 1)
            norm = 1 / lattice.filter(ones).flatten()
            before = norm if name == "before" else norm**0
            return lattice.weighted(before, weight * (norm if name == "after" else norm**0))

        monkeypatch.setattr(dense_crf, "_normalized", normalized)
        dense_crf._gaussian_kernel.cache_clear()
        # Unnormalised messages are some 60 times larger.
        close(run(), case[f"q_{name}_3"], 1e-4 if name == "none" else 2e-5)
    dense_crf._gaussian_kernel.cache_clear()


@recorded("crf_dark_pad")
def test_padding_of_dark_images_matches_reference(case):
    """Pixel counts that are no multiple of 4: x86 builds pad with zero features, which link dark pixels."""
    case.irrelevant("tag")
    crf = DenseCRF(
        gaussian_compat=0, bilateral_sigma_xy=50, bilateral_sigma_rgb=5, bilateral_compat=4, steps=3
    )
    for item in "abc":
        image, q = photo(case[f"{item}_image"]), case[f"{item}_q_3"]
        close(infer(crf, image, case[f"{item}_unary"].view_as(q)), q)


@recorded("crf_labels_photo")
def test_labels_match_reference(case):
    case.irrelevant("tag")
    image, label, crf = photo(case["image"]), case["labels"], DenseCRF("irn")
    unary = energy_of_labels(label, 3)
    torch.testing.assert_close(unary.unique(), case["unary_levels_3"].sort().values, rtol=0, atol=2e-7)
    close(infer(crf, image, unary), case["q_label_3_10"])
    # Label 0 of this call favours none of the two classes.
    unsure = torch.where(label == 0, math.log(2), energy_of_labels((label.long() - 1).clamp(0), 2)).float()
    close(infer(crf, image, unsure), case["q_label_unsure_2_10"])
    case.same("argmax_label_21_10", infer(crf, image, energy_of_labels(label, 21)).argmax(0))


@recorded("crf_photo_21")
def test_photo_with_21_labels_matches_reference(case):
    image = photo(case["image"])
    logits = torch.from_numpy(2.5 * formula_array(f"{case['tag']}/crf_photo", (1, 21, 7, 10)))
    logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
    unary = energy_of_probs(logits.softmax(1))[0]
    for key in case.starting("argmax_"):
        parameters, steps = key.split("_")[1:]
        q = infer(DenseCRF(SETS[parameters], steps=int(steps)), image, unary)
        case.compare(f"q_{parameters}_{steps}_stride8", q[:, ::8, ::8], rtol=0, atol=5e-5)
        case.same(key, q.argmax(0), differing=1e-4)
        case.compare(f"classmass_{parameters}_{steps}", q.double().sum((1, 2)), rtol=1e-5, atol=0)


# --- properties ---


def scene(batch=1, labels=4, height=25, width=30, seed=0):
    """Images and probabilities that do not add up to anything in particular."""
    generator = torch.Generator().manual_seed(seed)
    image = F.interpolate(
        torch.rand(batch, 3, 4, 5, generator=generator) * 255, (height, width), mode="bilinear"
    )
    probs = F.interpolate(
        torch.rand(batch, labels, 5, 6, generator=generator), (height, width), mode="bilinear"
    )
    return image.floor() / 255, probs


CRF = DenseCRF("psa", steps=3)


@pytest.mark.parametrize("labels", [1, 2, 21])
@pytest.mark.parametrize("changes", [{"gaussian_compat": 0, "bilateral_compat": 0}, {"steps": 0}])
def test_without_pairwise_terms_it_is_a_softmax(labels, changes):
    image, probs = scene(labels=labels)
    expected = torch.softmax(-energy_of_probs(probs), 1)
    torch.testing.assert_close(DenseCRF(**changes).refine(image, probs), expected)


def test_batch_equals_images_one_by_one():
    """In one lattice, as on a GPU, and one by one, as on a CPU; each repeats to the bit."""
    image, probs = scene(3)
    alone = torch.cat([CRF.refine(image[i : i + 1], probs[i : i + 1]) for i in range(3)])
    assert torch.equal(CRF.refine(image, probs), alone)
    together = CRF._mean_field(image, [energy_of_probs(probs)])[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_labels_of_equal_energy_are_merged_without_changing_the_result():
    image, probs = scene(labels=6)
    probs[:, 3:] = 0  # absent classes, all clipped to the same floor
    energy = energy_of_probs(probs)
    assert len(Columns.of(energy.flatten(2), [6]).labels) == 4
    merged = CRF.refine_energies(image, [energy])[0]
    energy[:, 4] += 2e-6  # a few units in the last place: no longer equal
    energy[:, 5] -= 2e-6
    torch.testing.assert_close(merged, CRF.refine_energies(image, [energy])[0], rtol=0, atol=2e-6)
    assert torch.equal(merged[:, 3], merged[:, 5])


def test_equal_samples_are_not_mistaken_for_equal_labels():
    """Two labels that differ in one pixel, whichever it is."""
    image, probs = scene(labels=3, height=40, width=41)
    probs[:, 2] = probs[:, 1]
    probs[:, 2, 20, 17] = 0.99
    q = CRF.refine(image, probs)
    assert q[0, 2, 20, 17] > 1.5 * q[0, 1, 20, 17]


def test_works_in_every_gradient_and_precision_mode():
    """The cached smoothness kernel made in one mode serves the others."""
    image, probs = scene(height=21, width=23)
    with torch.inference_mode():
        expected = CRF.refine(image, probs).clone()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = CRF.refine(image, probs.requires_grad_())
    assert torch.equal(mixed, expected) and not mixed.requires_grad and mixed.dtype == torch.float32


def test_protocol_ids_name_every_change():
    assert DenseCRF("seco").protocol == "crf(seco)"
    assert (
        DenseCRF("toco", steps=5, bilateral_sigma_rgb=7).protocol == "crf(toco,bilateral_sigma_rgb=7,steps=5)"
    )
    assert DenseCRF("psa", bilateral_sigma_xy=80) == DenseCRF("psa")


@pytest.mark.parametrize("broken", ["nan", "-inf", "all"])
def test_energies_without_a_distribution_are_refused(broken):
    image, probs = scene(labels=3)
    energy = energy_of_probs(probs)
    energy[0, 0, 0, 0] = torch.inf  # one label ruled out is fine
    CRF.refine_energies(image, [energy])
    if broken == "all":
        energy[0, :, 0, 0] = torch.inf
    else:
        energy[0, 1, 0, 0] = float(broken)
    with pytest.raises(ValueError, match="NaN, -inf"):
        CRF.refine_energies(image, [energy])


@pytest.mark.parametrize(
    ("change", "key_term"),
    [
        (lambda image, probs: (image, probs[..., :-1]), "do not fit"),
        (lambda image, probs: ((255 * image).byte(), probs), "floats"),
        (lambda image, probs: (image, probs * float("nan")), "NaN"),
    ],
)
def test_bad_input_is_one_clear_error(change, key_term):
    with pytest.raises(ValueError, match=key_term):
        CRF.refine(*change(*scene()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    image, probs = scene(3, labels=21, height=120, width=160)
    on_gpu = CRF.refine(image.cuda(), probs.cuda()).cpu()
    torch.testing.assert_close(on_gpu, CRF.refine(image, probs), rtol=0, atol=2e-5)


def test_the_compiled_crf_gives_the_same_probabilities():
    pytest.importorskip("pydensecrf.densecrf")
    generator = torch.Generator().manual_seed(0)
    image_rgb = torch.rand(1, 3, 40, 50, generator=generator)
    probs = torch.rand(1, 3, 40, 50, generator=generator).softmax(1)
    ours, compiled = (
        create_refiner(name, preset="toco", steps=3).refine(image_rgb, probs)
        for name in ("dense_crf", "pydensecrf")
    )
    torch.testing.assert_close(compiled, ours, rtol=0, atol=1e-3)
