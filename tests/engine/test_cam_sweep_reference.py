"""The threshold sweep and the scores of label images: the numbers of SEAM's and IRN's evaluation programs."""

import torch

from datasets.base import Record, Split
from engine.scores.confusion import ConfusionMatrix
from engine.scores.report import count_pixels
from tests.recorded import recorded
from tools.evaluate import CamSweep
from utils.cam_files import CamFile
from utils.image import write_mask


def split_of(case, folder):
    """The split of a recorded case with masks on disk, and the CAM files of its images."""
    records, cams = [], []
    share = case.noted(r"([\d.]+)\*uniform", 0.6)
    for i in range(len(case.starting("gt_map"))):
        truth, classes = case[f"gt_map{i}"], case[f"classes{i}"].sort().values
        write_mask(folder / f"{i}.png", truth)
        maps = [share * case.input(f"cam{i}_{r}") + (1 - share) * (truth == r + 1) for r in classes.tolist()]
        records.append(Record(str(i), folder / f"{i}.jpg", folder / f"{i}.png", None))
        cams.append(CamFile(classes + 1, torch.stack(maps), None, tuple(truth.shape)))
    names = ("background", *(f"class {k}" for k in range(1, case["sweep"].shape[1] - 1)))
    return Split("recorded", names, tuple(records)), cams


def percent(scores):
    """SEAM's columns: IoU of every class, 0 for one that never occurs, and their plain mean."""
    iou = 100 * scores.iou.nan_to_num(0.0)
    return torch.cat([iou, iou.mean()[None]])


@recorded("ms_cam_eval")
def test_scores_match_the_published_programs(case, tmp_path):
    split, cams = split_of(case, tmp_path)
    thresholds = tuple(case["thresholds"].tolist())
    single = {name: int(name[-3:]) / 100 for name in case.starting("irn_iou_")}
    sweep = CamSweep(split, "cpu", thresholds[0], (*thresholds, *single.values()))
    for record, cam in zip(split.records, cams):
        sweep.add(record, cam)
    found = sweep.sweeps["cam"].scores()
    case.compare("sweep", torch.stack([percent(found[t]) for t in thresholds]), rtol=0)
    for name, threshold in single.items():
        case.compare(name, found[threshold].iou.nan_to_num(-1.0), rtol=0)
        case.compare(name.replace("iou", "miou"), found[threshold].iou.nanmean(), rtol=0)

    matrix = ConfusionMatrix(split.num_classes)
    for i, record in enumerate(split.records):
        count_pixels(matrix, record, case[f"png_pred{i}"].numpy())
    case.compare("png_eval", percent(matrix.scores()), rtol=0)
