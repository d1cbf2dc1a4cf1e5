"""Activation maps and the labels read off them."""

import torch
from torch.testing import assert_close

from ops.cam import background_score, best_class, multi_scale_cam, present_classes
from ops.labels import (
    affinity_label,
    box_on_tokens,
    cam_to_confident_label,
    ignore_outside_box,
    region_mask,
    threshold_label,
)
from tests.cams import scored_label
from tests.formula import stats
from tests.recorded import recorded

TIGHT = dict(rtol=1e-5, atol=1e-6)


@recorded("vit_mscam")
def test_multi_scale_cam_matches_reference_values(case):
    for tag in case.tags():
        size = case.setting("shape|size|image", {"a": (64, 96), "b": (80, 72)}.get(tag, (0, 0)), tag)[-2:]
        size = (len(case[f"{tag}/cam"]), case.setting("classes|num_classes", 20, tag), *size)
        b, classes, h, w = case.full_shape(f"{tag}/cam", (1, 3, 2, 2), size)
        image = case.arr(f"mscam/x_{tag}", (b, 3, h, w))
        network = case.toy_cam_network("mscam", classes)
        cams = multi_scale_cam(network, image, case[f"{tag}/scales"].tolist())
        for name, cam in zip(("cam", "cam_aux"), cams):
            case.compare(f"{tag}/{name}", cam[:, ::3, ::2, ::2])
            case.compare(f"{tag}/{name}_stats", stats(cam))


@recorded("vit_cam_labels")
def test_labels_match_reference_values(case):
    b, h, w = case["label_nobox"].shape
    class_label, box = case["y"].float(), case["box"]
    cam = case.smooth_cams("label/cam", b, class_label.shape[1], h, w, case.setting("cell", 8))
    high, low, background = case["thre_high_low_bkg"].tolist()
    plain = scored_label(cam, class_label, background)
    confident = cam_to_confident_label(cam, class_label, low, high)
    case.same("label_nobox", plain)
    case.same("label_box_nomid", ignore_outside_box(plain, box))
    case.same("label_box_mid", ignore_outside_box(confident, box))
    case.same("toco_roi", region_mask(cam, class_label, low, high))
    case.same("aff_mask", affinity_label(case["aff_label"].long()))
    case.compare("valid_cam_stats", stats(cam * class_label[:, :, None, None]))


def test_a_score_at_a_threshold_is_below_it():
    score, one = torch.tensor([[[0.25, 0.5, 0.75, 1.0]]]), torch.ones(1, 1)
    assert threshold_label(score, torch.ones_like(score), 0.5).tolist() == [[[0, 0, 1, 1]]]
    label = cam_to_confident_label(score[None], one, 0.25, 0.75)
    assert label.tolist() == [[[0, 255, 255, 1]]]
    assert region_mask(score[None], one, 0.25, 0.75).tolist() == [[[0, 1, 2, 2]]]


def test_the_padding_of_present_classes_never_wins():
    present = present_classes(torch.tensor([[0.0, 1, 0], [1, 0, 1]]))
    cam = torch.ones(2, 3, 4, 4)
    cam[0, 1] = 0.5  # the only class of the first image is its weakest map
    score, label = best_class(present.select(cam), present.label, present.class_ids)
    assert (label[0] == 2).all() and (score[0] == 0.5).all()


def test_present_classes_give_the_labels_of_all_classes():
    generator = torch.Generator().manual_seed(0)
    cam = torch.rand(4, 20, 16, 16, generator=generator)
    class_label = (torch.rand(4, 20, generator=generator) < 0.15).float()
    class_label[2] = 0
    present = present_classes(class_label)
    part, ids = present.select(cam), present.class_ids
    assert (present.label.sum(1) == class_label.sum(1)).all()
    for make in (
        lambda *a, **k: threshold_label(*best_class(*a, **k), 0.5),
        lambda *a, **k: cam_to_confident_label(*a, 0.25, 0.9, **k),
        lambda *a, **k: best_class(*a, **k)[0],
    ):
        assert_close(make(part, present.label, class_ids=ids), make(cam, class_label))
    assert_close(region_mask(part, present.label, 0.25, 0.7), region_mask(cam, class_label, 0.25, 0.7))


def test_box_on_tokens_keeps_tokens_whose_centre_is_inside():
    boxes = torch.tensor([[0, 224, 0, 224], [8, 200, 9, 217], [7, 216, 24, 25]])
    for box, tokens in zip(boxes, box_on_tokens(boxes, 16)):
        for start, stop, first, last in ((*box[:2], *tokens[:2]), (*box[2:], *tokens[2:])):
            # The centre of token i is the border between pixels 16 i + 7 and 16 i + 8.
            inside = [i for i in range(14) if start <= 16 * i + 8 and 16 * i + 8 < stop]
            assert inside == list(range(int(first), int(last)))


def test_background_of_a_cam_that_rounding_left_above_one_is_nothing():
    cam = torch.tensor([1.0, 1.0001, 0.5])[None, None]
    assert_close(background_score(cam, 2.5), torch.tensor([[0.0, 0.0, 0.5**2.5]]), **TIGHT)
