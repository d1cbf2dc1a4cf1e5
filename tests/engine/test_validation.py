"""Validation on a split, protocol ids, provenance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.agreement import compare_masks_with_tags
from datasets.base import Record, Split, WeakSegDataset
from engine.scores.miou import matrix_of
from engine.scores.records import protocol_id
from engine.validation import protocols, validate
from methods.base import Method, Prediction
from ops.cam import normalize_cam
from tests.processes import in_a_group
from utils.distributed import init_process_group
from utils.image import normalize, read_mask, write_mask

NAMES = ("background", "cat", "dog", "boat")


class Colours(Method):
    """The three colour channels are the activations of the three classes."""

    def __init__(self, outputs=("cam", "aux_cam", "seg")):
        super().__init__(4, {}, background_threshold=0.4)
        self.outputs = outputs

    def predict(self, image, scales):
        cam = normalize_cam(image)
        seg = torch.cat([cam.new_full((len(cam), 1, *cam.shape[2:]), 0.6), cam], 1)
        given = {"cam": cam, "aux_cam": normalize_cam(image.flip(1)), "seg": F.avg_pool2d(seg, 4)}
        chosen = [given[name] if name in self.outputs else None for name in ("cam", "aux_cam", "seg")]
        return Prediction(chosen[0], chosen[1], image.mean((2, 3)), chosen[2])


def run(method, split, **options):
    dataset = WeakSegDataset(split, with_mask=True)
    return validate(method, dataset, size=32, device="cpu", progress=False, **options)


def matrices(evaluation):
    return {output: matrix_of(values.more).tolist() for output, values in evaluation.results["miou"].items()}


def published_label(cam, class_label, threshold):
    """The authors' rule: all classes at full size, those without a tag set to 0, background up to the
    threshold."""
    score, channel = (cam * class_label[:, :, None, None]).max(1)
    return torch.where(score > threshold, channel + 1, 0)


def naive(split):
    """The protocol written out: square resize, one prediction, maps at the mask's size, counts in a loop."""
    matrices = {name: np.zeros((4, 4), dtype=int) for name in ("cam", "aux_cam", "seg")}
    for sample in WeakSegDataset(split, with_mask=True):
        image = normalize(sample["image"])[None]
        image = F.interpolate(image, (32, 32), mode="bilinear", align_corners=False)
        out = Colours().predict(image, (1.0,))
        maps = [
            F.interpolate(m, sample["mask"].shape, mode="bilinear", align_corners=False)
            for m in (out.cam, out.aux_cam, out.seg_logits)
        ]
        labels = [published_label(m, sample["class_label"][None], 0.4)[0] for m in maps[:2]]
        labels.append(maps[2].argmax(1)[0])
        for name, label in zip(matrices, labels):
            for t, p in zip(sample["mask"].flatten().tolist(), label.flatten().tolist()):
                if t != 255:
                    matrices[name][t, p] += 1
    return matrices


def test_follows_the_training_time_protocol(split):
    method = Colours().train()
    result = run(method, split)
    assert result.images == 5 and method.training
    assert matrices(result) == {name: matrix.tolist() for name, matrix in naive(split).items()}


def test_batches_of_images_change_nothing(split):
    one, four = run(Colours(), split), run(Colours(), split, batch_size=4)
    assert matrices(one) == matrices(four) and one.percent() == pytest.approx(four.percent())


def share_of_validation(rank, split):
    init_process_group("cpu")
    result = run(Colours(outputs=("cam", "seg")), split)
    return matrices(result), result.percent(), int(result.images)


def test_two_processes_have_the_same_scores_as_one(split):
    alone = run(Colours(outputs=("cam", "seg")), split)
    for found, percent, images in in_a_group(share_of_validation, split):
        assert found == matrices(alone) and images == 5
        assert percent == pytest.approx(alone.percent())


def test_outputs_that_a_method_does_not_have_are_left_out(split):
    assert list(run(Colours(outputs=("cam",)), split).percent()) == ["cam", "tag_f1"]
    assert list(run(Colours(outputs=("seg",)), split).percent()) == ["seg", "tag_f1"]


def test_untagged_images_count_for_the_segmentation_only(split):
    untagged = Split("val", NAMES, tuple(Record(r.name, r.image, r.mask, None) for r in split.records))
    result = run(Colours(), untagged)
    assert list(matrices(result)) == ["seg"] and list(result.percent()) == ["seg"]


def test_masks_that_ignore_every_object_end_a_training_before_it_begins(split):
    """Masks of 0 and 255: the score would be that of background, and high."""
    compare_masks_with_tags(split)
    for record in split.records:
        write_mask(record.mask, np.where(read_mask(record.mask) > 0, 255, 0))
    with pytest.raises(ValueError, match=r"no mask of .*masks/0\.png"):
        compare_masks_with_tags(split)
    # Images without objects may well have such masks.
    empty = Split("val", NAMES, tuple(replace(record, tags=()) for record in split.records))
    compare_masks_with_tags(empty)


def test_a_score_named_in_the_config_is_in_log_tables_and_records(split):
    result = run(Colours(), split, scores=["miou", "boundary_f"])
    percent = result.percent()
    assert list(percent) == ["cam", "aux_cam", "seg"] + [f"{x}_boundary_f" for x in ("cam", "aux_cam", "seg")]
    lines = result.tables().splitlines()
    assert [text.strip() for text in lines[0].split("|")] == ["Class", "CAM", "aux_CAM", "Seg_Pred"]
    assert lines[7].startswith("mIoU") and f"{percent['seg']:.2f}" in lines[7]
    assert "Seg_Pred boundary F" in lines[9] and f"{percent['seg_boundary_f']:.2f}" in lines[-1]
    records = result.records(protocols(Colours(), "val"), {}, {})
    assert [100 * record["score"]["boundary_f"] for record in records] == list(percent.values())[3:]
    assert "boundary_f" in records[0]["score"]["per_class"]["cat"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(kind="seg"), "seg/val/ss"),
        (dict(kind="seg", scales=[1.0, 1.25], flip=True), "seg/val/ms+flip"),
        (dict(kind="seg", scales=[0.5], flip=True, refiner="crf(toco)"), "seg/val/ss(0.5)+flip+crf(toco)"),
        (dict(kind="seg", scales=[0.5, 1.0], tags=True, refiner="crf(toco)"), "seg/val/ms+tags+crf(toco)"),
        # Scale 1 and the mirror image belong to every CAM, listed or not.
        (dict(kind="cam"), "cam/val/ss+flip"),
        (dict(kind="cam", scales=[0.5]), "cam/val/ms+flip"),
    ],
)  # fmt: skip
def test_protocol_ids(arguments, expected):
    assert protocol_id(split="val", **arguments) == expected


def test_every_score_has_the_id_of_how_it_was_made(split):
    method = Colours()
    method.cam_scales = (1.0, 0.5)
    records = run(method, split).records(protocols(method, "val"), {}, {})
    assert [record["protocol"] for record in records] == [
        "cam/val/ms+flip@0.40", "aux_cam/val/ms+flip@0.40", "seg/val/ss",
    ]  # fmt: skip
