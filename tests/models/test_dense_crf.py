"""DenseCRF against recorded pydensecrf results, and properties that hold for any input."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.refiners.dense_crf import (
    PRESETS,
    DenseCRF,
    _Columns,
    merge_confident_labels,
    unary_from_labels,
    unary_from_probs,
)
from tests.formula import formula_array
from tests.methods.single_stage import assert_stored, case_input, grey_levels

SETS = {
    "seg": DenseCRF.preset("toco"),
    "cam": DenseCRF.preset("toco_pseudo_label"),
    "soft": DenseCRF.preset("psa"),
    "label": DenseCRF.preset("irn"),
}


def planar(image):
    return image.permute(2, 0, 1)


def close(q, expected, tolerance=2e-5):
    """Largest difference within tolerance, and the same winner wherever it is clear."""
    torch.testing.assert_close(q, expected, rtol=0, atol=tolerance)
    best = expected.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    assert torch.equal(q.argmax(0)[clear], expected.argmax(0)[clear])


@pytest.mark.parametrize("name", ["crf_softmax_2", "crf_softmax_3", "crf_softmax_21"])
def test_probabilities_match_reference(golden, name):
    case = golden(name)
    compared = [key for key in case if key.startswith("q_")]
    assert compared
    for key in compared:
        _, parameters, steps = key.split("_")
        crf = DenseCRF.preset(SETS[parameters].name, steps=int(steps))
        close(crf(planar(case["image"]), case["prob"]), case[key])


@pytest.mark.parametrize("system", ["wsfcn", "onestage"])
def test_presets_of_the_single_stage_cnns_match_reference(golden, system):
    case = golden(f"{system}_crf")
    scores = case_input(case, "logits").softmax(0)
    scores[1:] *= case["labels"][:, None, None]
    if system == "wsfcn":  # the background of its unary is what the foreground leaves
        preset, scores[0] = "ws_fcn", (1 - scores[1:].amax(0)) ** 5
    else:
        preset, scores[0] = "one_stage", scores[0] ** 3
    q = DenseCRF.preset(preset)(grey_levels(case_input(case, "image")), scores)
    assert_stored(case, "q", q, rtol=1e-3, atol=1e-4)
    assert (q.argmax(0) != case["argmax"]).float().mean() <= 0.002


def test_single_kernels_and_normalizations_match_reference(golden):
    case = golden("crf_kernels")
    image, unary = planar(case["image"]), case["unary"].view_as(case["prob"])
    torch.testing.assert_close(unary_from_probs(case["prob"]), unary, rtol=0, atol=2e-6)

    def run(steps=3, **changes):
        return DenseCRF.preset("psa", steps=steps, **changes).infer(image, unary)

    close(run(bilateral_compat=0), case["q_gauss_only_3"])
    close(run(gaussian_compat=0), case["q_bilat_only_3"])
    close(run(0), case["q_zero_iterations"])
    for normalization in ("none", "before", "after", "symmetric"):
        # Unnormalised messages are some 60 times larger.
        tolerance = 1e-4 if normalization == "none" else 2e-5
        close(run(normalization=normalization), case[f"q_{normalization}_3"], tolerance)


def test_padding_of_dark_images_matches_reference(golden):
    """Pixel counts that are no multiple of 4: x86 builds pad with zero features, which link dark pixels."""
    case = golden("crf_dark_pad")
    crf = DenseCRF(
        gaussian_compat=0, bilateral_sigma_xy=50, bilateral_sigma_rgb=5, bilateral_compat=4, steps=3
    )
    for item in "abc":
        image = planar(case[f"{item}_image"])
        q = crf.infer(image, case[f"{item}_unary"].view(3, *image.shape[1:]))
        close(q, case[f"{item}_q_3"])


def test_labels_match_reference(golden):
    case = golden("crf_labels_photo")
    image, label = planar(case["image"]), case["labels"]
    unary = unary_from_labels(label, 3)
    torch.testing.assert_close(unary.unique(), case["unary_levels_3"].sort().values, rtol=0, atol=2e-7)
    close(SETS["label"].infer(image, unary), case["q_label_3_10"])
    unsure = unary_from_labels(label, 2, zero_unsure=True)
    close(SETS["label"].infer(image, unsure), case["q_label_unsure_2_10"])
    many = SETS["label"].infer(image, unary_from_labels(label, 21))
    assert torch.equal(many.argmax(0).to(torch.uint8), case["argmax_label_21_10"])


def test_photo_with_21_labels_matches_reference(golden):
    case = golden("crf_photo_21")
    image = planar(case["image"])
    tag = str(case["tag"])
    logits = torch.from_numpy(2.5 * formula_array(f"{tag}/crf_photo", (1, 21, 7, 10)))
    logits = F.interpolate(logits, image.shape[1:], mode="bilinear", align_corners=False)
    unary = unary_from_probs(logits.softmax(1))[0]
    for parameters in ("seg", "soft"):
        q = SETS[parameters].infer(image, unary)
        torch.testing.assert_close(q[:, ::8, ::8], case[f"q_{parameters}_10_stride8"], rtol=0, atol=5e-5)
        assert (q.argmax(0) != case[f"argmax_{parameters}_10"]).float().mean() < 1e-4
        mass = q.double().sum((1, 2))
        torch.testing.assert_close(mass, case[f"classmass_{parameters}_10"], rtol=1e-5, atol=0)


# --- properties ---


def scene(batch=1, labels=4, height=25, width=30, seed=0):
    """Images (uint8) and probabilities that do not add up to anything in particular."""
    generator = torch.Generator().manual_seed(seed)
    image = F.interpolate(
        torch.rand(batch, 3, 4, 5, generator=generator) * 255, (height, width), mode="bilinear"
    )
    probs = F.interpolate(
        torch.rand(batch, labels, 5, 6, generator=generator), (height, width), mode="bilinear"
    )
    return image.to(torch.uint8), probs


CRF = DenseCRF.preset("psa", steps=3)


def test_result_is_a_distribution_over_labels():
    q = CRF(*scene(2))
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
    assert (q >= 0).all()


@pytest.mark.parametrize("labels", [1, 2, 21])
def test_without_pairwise_terms_it_is_a_softmax(labels):
    image, probs = scene(labels=labels)
    expected = torch.softmax(-unary_from_probs(probs), 1)
    torch.testing.assert_close(DenseCRF(gaussian_compat=0, bilateral_compat=0)(image, probs), expected)
    torch.testing.assert_close(DenseCRF(steps=0)(image, probs), expected)


def test_labels_can_be_permuted():
    image, probs = scene()
    order = [2, 0, 3, 1]
    torch.testing.assert_close(CRF(image, probs[:, order]), CRF(image, probs)[:, order], rtol=0, atol=3e-6)


def test_batch_equals_images_one_by_one():
    """In one lattice, as on a GPU, and one by one, as on a CPU."""
    image, probs = scene(3)
    alone = torch.stack([CRF(i, p) for i, p in zip(image, probs, strict=True)])
    assert torch.equal(CRF(image, probs), alone)
    together = CRF._mean_field(image, [unary_from_probs(probs)])[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_repeats_to_the_bit():
    assert torch.equal(CRF(*scene()), CRF(*scene()))


def test_recipes_in_one_pass_equal_two_runs():
    image, probs = scene(2)
    other = scene(2, labels=3, seed=1)[1]
    both = CRF.infer_together(image, [unary_from_probs(probs), unary_from_probs(other)])
    for q, p in zip(both, (probs, other), strict=True):
        torch.testing.assert_close(q, CRF(image, p), rtol=0, atol=2e-6)


def test_input_is_left_alone():
    image, probs = scene()
    unary = unary_from_probs(probs)
    copies = image.clone(), probs.clone(), unary.clone()
    CRF(image, probs), CRF.infer(image, unary)
    assert all(torch.equal(a, b) for a, b in zip((image, probs, unary), copies, strict=True))


def test_labels_of_equal_energy_are_merged_without_changing_the_result():
    image, probs = scene(labels=6)
    probs[:, 3:] = 0  # absent classes, all clipped to the same floor
    unary = unary_from_probs(probs)
    merged = CRF.infer(image, unary)
    unary[:, 4] += 2e-6  # a few units in the last place: no longer equal
    unary[:, 5] -= 2e-6
    torch.testing.assert_close(merged, CRF.infer(image, unary), rtol=0, atol=2e-6)
    assert torch.equal(merged[:, 3], merged[:, 5])
    assert len(_Columns.of(unary_from_probs(probs).flatten(2), [6], merge=True, drop_below=0).labels) == 4


def test_dropped_labels_leave_the_costs_of_the_others():
    """A matrix of costs loses the rows and columns of what is dropped."""
    image, probs = scene(labels=4)
    probs[:, 2] = 1e-4
    probs = probs / probs.sum(1, keepdim=True)
    costs = -torch.eye(4)
    dropped = DenseCRF(bilateral_compat=costs, drop_below=0.01, steps=2)(image, probs)
    kept = [0, 1, 3]
    alone = DenseCRF(bilateral_compat=costs[:3, :3], steps=2)(image, probs[:, kept])
    assert not dropped[:, 2].any()
    torch.testing.assert_close(dropped[:, kept], alone, rtol=0, atol=1e-6)


def test_pydensecrf_does_not_pretend_to_drop_labels():
    with pytest.raises(ValueError, match="drop_below needs the lattice"):
        DenseCRF(backend="pydensecrf", drop_below=0.01)


@pytest.mark.parametrize("broken", ["nan", "-inf", "all"])
def test_energies_without_a_distribution_are_refused(broken):
    image, probs = scene(labels=3)
    unary = unary_from_probs(probs)
    unary[0, 0, 0, 0] = torch.inf  # one label ruled out is fine
    CRF.infer(image, unary.clone())
    if broken == "all":
        unary[0, :, 0, 0] = torch.inf
    else:
        unary[0, 1, 0, 0] = float(broken)
    with pytest.raises(ValueError, match=r"NaN, -inf, or a pixel with \+inf alone"):
        CRF.infer(image, unary)


def test_equal_samples_are_not_mistaken_for_equal_labels():
    """Two labels that differ in one pixel, whichever it is."""
    image, probs = scene(labels=3, height=40, width=41)
    probs[:, 2] = probs[:, 1]
    probs[:, 2, 20, 17] = 0.99
    q = CRF(image, probs)
    assert q[0, 2, 20, 17] > 1.5 * q[0, 1, 20, 17]


def test_improbable_labels_are_dropped_on_request_only():
    image, probs = scene(labels=4)
    probs[:, 3] *= 0.009
    crf = DenseCRF.preset("psa", steps=3, drop_below=0.01)
    q = crf(image, probs)
    assert (q[:, 3] == 0).all() and (CRF(image, probs)[:, 3] > 0).all()
    torch.testing.assert_close(q[:, :3], CRF(image, probs[:, :3]), rtol=0, atol=1e-6)
    assert crf.protocol == "crf(psa,steps=3,drop_below=0.01)"
    assert torch.isfinite(crf(image, probs * 1e-3)).all()  # the best label stays


def test_compatibility_matrix_generalises_the_potts_weight():
    """Minus identity times w, as costs, is a Potts weight of w; a vector is a diagonal matrix."""
    image, probs = scene(labels=3)
    potts = DenseCRF(gaussian_compat=2, bilateral_compat=5, steps=3)(image, probs)
    matrix = DenseCRF(gaussian_compat=-2 * np.eye(3), bilateral_compat=[-5, -5, -5], steps=3)(image, probs)
    torch.testing.assert_close(matrix, potts, rtol=0, atol=2e-6)
    skew = np.array([[0, 2, 0], [0, 0, 0], [0, 0, 0]]) - 5 * np.eye(3)
    even = (skew + skew.T) / 2
    first, second = (DenseCRF(bilateral_compat=m, steps=3)(image, probs) for m in (skew, even))
    assert torch.equal(first, second) and not torch.allclose(first, potts, atol=1e-3)


def test_large_messages_do_not_overflow():
    image, probs = scene(labels=3)
    q = DenseCRF(bilateral_compat=500, gaussian_compat=0, normalization="none", steps=3)(image, probs)
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))


def test_works_in_every_gradient_and_precision_mode():
    """The cached smoothness kernel made in one mode serves the others."""
    image, probs = scene(height=21, width=23)
    with torch.inference_mode():
        expected = CRF(image, probs).clone()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = CRF(image, probs.requires_grad_())
    assert torch.equal(mixed, expected) and not mixed.requires_grad and mixed.dtype == torch.float32


def test_presets_and_protocol_ids():
    assert {"toco", "seco", "mcc", "irn", "psa", "seam", "ws_fcn", "one_stage", "toco_pseudo_label"} <= set(
        PRESETS
    )
    assert DenseCRF.preset("seco").protocol == "crf(seco)"
    assert DenseCRF.preset("toco", steps=5).protocol == "crf(toco,steps=5)"
    assert DenseCRF.from_config({"preset": "toco", "steps": 5}) == DenseCRF.preset("toco", steps=5)
    assert DenseCRF(bilateral_sigma_rgb=7).protocol == (
        "crf(custom,gaussian_sigma_xy=3,gaussian_compat=3,bilateral_sigma_xy=80,bilateral_sigma_rgb=7,bilateral_compat=10)"
    )
    with pytest.raises(KeyError, match="choose one of"):
        DenseCRF.preset("tocco")
    with pytest.raises(KeyError, match="'sigma'"):
        DenseCRF.preset("toco", sigma=3)


def test_confident_labels_need_two_agreeing_runs():
    foreground_run = torch.tensor([[0, 0, 2, 2]])
    background_run = torch.tensor([[0, 2, 2, 0]])
    assert merge_confident_labels(foreground_run, background_run).tolist() == [[0, 255, 2, 2]]


def test_bad_input_is_one_clear_error():
    image, probs = scene()
    with pytest.raises(ValueError, match="do not fit images"):
        CRF(image, probs[..., :-1])
    with pytest.raises(ValueError, match="do not fit images"):
        CRF(image, probs[:, :0])
    with pytest.raises(ValueError, match="do not fit images"):
        CRF(image[..., :0], probs[..., :0])
    with pytest.raises(ValueError, match="NaN"):
        CRF(image, probs.fill_(float("nan")))
    with pytest.raises(ValueError, match="normalization"):
        DenseCRF(normalization="Symmetric")
    with pytest.raises(ValueError, match="do not fit a unary of"):
        DenseCRF(bilateral_compat=np.eye(3))(*scene(labels=4))
    with pytest.raises(ValueError, match="at least 2"):
        unary_from_labels(torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match=r"0\.\.255 are outside"):
        unary_from_labels(torch.tensor([[0, 255]]), 3)


@pytest.mark.parametrize(
    "changes", [{}, {"normalization": "after"}, {"gaussian_compat": 0}, {"bilateral_compat": -np.eye(4)}]
)
def test_equals_pydensecrf_where_it_is_installed(changes):
    pytest.importorskip("pydensecrf.densecrf")
    image, probs = scene(2)
    original = DenseCRF.preset("psa", backend="pydensecrf", **changes)(image, probs)
    torch.testing.assert_close(DenseCRF.preset("psa", **changes)(image, probs), original, rtol=0, atol=2e-5)


def test_without_pydensecrf_its_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ImportError, match="pydensecrf2"):
        DenseCRF(backend="pydensecrf")(*scene())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    image, probs = scene(3, labels=21, height=120, width=160)
    torch.testing.assert_close(CRF(image.cuda(), probs.cuda()).cpu(), CRF(image, probs), rtol=0, atol=2e-5)
