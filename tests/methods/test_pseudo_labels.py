"""Pseudo labels and local crops of ToCo."""

import pytest
import torch
from torch.testing import assert_close

from methods.toco import object_flags
from models.refiners.pixel_adaptive import PAR
from ops.cam import present_classes
from ops.crops import crop_positions, cut, random_order
from ops.labels import ignore_outside_box, refined_label, region_mask
from tests.formula import Formula, stats
from tests.recorded import recorded
from utils.image import denormalize


@recorded("vit_refine")
def test_refined_labels_match_reference_values(case):
    low, high = case.setting("low_threshold|low", 0.25), case.setting("high_threshold|high", 0.7)
    for tag in case.tags():
        b, h, w = case[f"{tag}/label"].shape
        image = case.smooth_image(f"refine/img_{tag}", f"refine/noise_{tag}", b, h, w, 8, 1.2, 0.3)
        class_label = case[f"{tag}/y"].float()
        cam = case.smooth_cams(f"refine/cam_{tag}", b, class_label.shape[1], h, w, 16, 3)
        # The recorded labels are of the wrapped-around image where the formula leaves the range of a byte.
        wrapped = denormalize(image).trunc().remainder(256) / 255
        case.compare(f"{tag}/denorm_stats", stats(wrapped), rtol=1e-3)
        near = (wrapped[:, :, ::8, ::8] - case[f"{tag}/denorm_sub"]).abs() < 1e-6
        assert near.float().mean() >= 0.999
        present = present_classes(class_label)
        label = refined_label(PAR().refine_all, wrapped, present.select(cam), present, low, high)
        case.same(f"{tag}/label", ignore_outside_box(label, case[f"{tag}/box"]), differing=0.002)


def test_refined_label_of_images_does_not_depend_on_their_batch():
    case = Formula()
    class_label = torch.zeros(3, 20)
    class_label[0, [1, 5, 7]] = class_label[2, 3] = 1  # the second image shows nothing
    image = case.arr("batch/image", (3, 3, 48, 56), 0, 1)
    cam = case.smooth_cams("batch/cam", 3, 20, 48, 56, 12, 2)
    whole = present_classes(class_label)
    label = refined_label(PAR().refine_all, image, whole.select(cam), whole, 0.25, 0.7)
    for i in range(3):
        one = present_classes(class_label[i : i + 1])
        assert_close(
            refined_label(PAR().refine_all, image[i : i + 1], one.select(cam[i : i + 1]), one, 0.25, 0.7),
            label[i : i + 1],
        )
    assert (label[1] == 0).all()
    assert set(label[0].unique().tolist()) <= {0, 2, 6, 8, 255} and 255 in label[0]


@recorded("vit_toco_crops")
def test_crops_match_reference_values(case):
    b, count = case["positions"].shape[:2]
    h, w = case.setting("size|image_size|shape", (160, 144))[-2:]
    size, class_label = case.setting("crop_size|local_crop_size", 96), case["y"].float()
    low, high = case.setting("low_threshold|low", 0.25), case.setting("high_threshold|high", 0.7)
    cam = case.smooth_cams("crop/cam", b, class_label.shape[1], h, w, case.setting("cell", 48), 4)
    cam[0] = cam[0] ** 0.15
    region = region_mask(cam, class_label, low, high)
    region[2] = 2
    region[2, 48:50, 50:52] = 1
    case.same("roi_rle_sum", region.long().sum((1, 2)))
    candidates = []

    def order(n):
        candidates.extend(n.tolist())
        return torch.stack([case.permutation(f"crop/perm{i}", int(k))[:count] for i, k in enumerate(n)])

    positions = crop_positions(region <= 1, size, count, order)
    case.same("perm_sizes", candidates)
    case.same("positions", positions)
    case.compare("flags", object_flags(cut(region[:, None], positions, size), 0.2))
    crops = cut(case.coordinate_image("crop/img", b, h, w), positions, size)  # (V, B, 3, s, s)
    assert_close(crops[:, :, :2, 0, 0].transpose(0, 1).long(), positions)
    case.compare("crop_abs_sums", crops[:, :, 2].abs().sum((2, 3)).T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("count, exactly", [(3, True), (4, False)])
def test_crops_take_candidates_as_long_as_there_are_enough(count, exactly):
    candidates = torch.zeros(1, 12, 12, dtype=torch.bool)
    candidates[0, [2, 5, 9], [3, 5, 9]] = True
    corners = crop_positions(candidates, 4, count, lambda n: torch.arange(count)[None])[0]
    assert (sorted(corners.tolist()) == [[0, 1], [3, 3], [7, 7]]) == exactly and len(corners) == count


def test_crops_need_room():
    with pytest.raises(ValueError, match="8 crops of 30 pixels"):
        crop_positions(torch.ones(1, 32, 32, dtype=torch.bool), 30, 8, lambda n: n[:, None])


def test_the_order_of_crops_is_the_start_of_a_permutation_of_their_number():
    n = torch.tensor([7, 8, 11, 300])
    for count in (1, 2, 7):
        generators = [torch.Generator().manual_seed(i) for i in range(len(n))]
        expected = [
            torch.randperm(int(k), generator=torch.Generator().manual_seed(i))[:count]
            for i, k in enumerate(n)
        ]
        assert torch.equal(random_order(n, count, generators), torch.stack(expected))
