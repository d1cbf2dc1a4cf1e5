"""The threshold sweep and the scores of label images: the numbers of SEAM's and IRN's evaluation programs."""

import pytest
import torch
from torch.testing import assert_close

from datasets.base import Record, Split
from engine.scores.confusion import ConfusionMatrix
from engine.scores.report import count_pixels
from tools.evaluate import CamSweep
from utils.cam_files import CamFile
from utils.image import write_mask

EXACT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture
def scored(golden, tmp_path):
    """The recorded case, its split with masks on disk, and the CAM files of its images."""
    case = golden("ms_cam_eval")
    records, cams = [], []
    for i in range(sum(key.startswith("gt_map") for key in case)):
        truth = case[f"gt_map{i}"]
        classes = case[f"classes{i}"].sort().values
        write_mask(tmp_path / f"{i}.png", truth)
        noise = [case.input(f"cam{i}_{r}") for r in classes.tolist()]
        maps = [0.6 * u + 0.4 * (truth == r + 1) for u, r in zip(noise, classes.tolist())]
        records.append(Record(str(i), tmp_path / f"{i}.jpg", tmp_path / f"{i}.png", None))
        cams.append(CamFile(classes + 1, torch.stack(maps), None, tuple(truth.shape)))
    names = ("background", *(f"class {k}" for k in range(1, case["sweep"].shape[1] - 1)))
    return case, Split("recorded", names, tuple(records)), cams


def percent(scores):
    """SEAM's columns: IoU of every class, 0 for one that never occurs, and their plain mean."""
    iou = 100 * scores.iou.nan_to_num(0.0)
    return torch.cat([iou, iou.mean()[None]])


def test_sweep_over_thresholds_matches_the_published_programs(scored):
    case, split, cams = scored
    thresholds = tuple(case["thresholds"].tolist())
    sweep = CamSweep(split, "cpu", 0.15, (*thresholds, 0.3))
    for record, cam in zip(split.records, cams):
        sweep.add(record, cam)
    found = sweep.sweeps["cam"].scores()
    assert_close(torch.stack([percent(found[t]) for t in thresholds]), case["sweep"], **EXACT)
    for threshold, name in ((0.15, "015"), (0.3, "030")):
        iou = found[threshold].iou
        assert_close(iou.nan_to_num(-1.0), case[f"irn_iou_{name}"], **EXACT)
        assert_close(iou.nanmean(), case[f"irn_miou_{name}"], **EXACT)


def test_scores_of_label_images_match_the_published_program(scored):
    case, split, _ = scored
    matrix = ConfusionMatrix(split.num_classes)
    for i, record in enumerate(split.records):
        count_pixels(matrix, record, case[f"png_pred{i}"].numpy())
    assert_close(percent(matrix.scores()), case["png_eval"], **EXACT)
