"""Scores: recorded values of the authors' evaluation programs, and properties that any score has."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from datasets.base import Record, Split
from engine.scores.base import NO_SCORES, ImagePrediction, create_score, plain
from engine.scores.cam_sweep import CamSweep
from engine.scores.confusion import top_confusions
from engine.scores.errors import CAUSES, causes
from engine.scores.evaluation import Evaluation
from engine.scores.miou import Miou, matrix_of
from engine.scores.tag_f1 import tag_f1
from tests.recorded import recorded
from utils.image import denormalize, write_mask

SHAPES = {"voc": (3, 40, 50), "coco": (2, 60, 40)}


def names(k):
    return ("background", *(f"class {i}" for i in range(1, k)))


def scored(score, truth, prediction, classes=None):
    """The values of a score for the label images (N, H, W)."""
    evaluation = evaluated([score], truth, prediction, classes)
    return evaluation.results[score]["seg"]


def evaluated(scores, truth, prediction, classes):
    evaluation = Evaluation(Split("test", names(classes), (Record("0", None, None, ()),)), scores)
    for mask, label in zip(truth, prediction, strict=True):
        evaluation.update({"name": "0", "mask": mask}, ImagePrediction({"seg": label}))
    return evaluation


def recorded_labels(case, tag):
    """Truth and prediction of a recorded case; a class never occurs in the truth, and for voc in neither."""
    k = case.setting("classes|num_classes|k", len(case[f"{tag}/iou"]), tag)
    shape = case.setting("shape", SHAPES.get(tag, SHAPES["voc"]), tag)
    absent = case.setting("absent_class|absent|missing_class", 5, tag)
    truth = case.ints(f"eval/gt_{tag}", shape, k + 3)
    truth = truth.masked_fill((truth >= k) | (truth == absent), 255)
    kept = (case.arr(f"eval/keep_{tag}", shape, 0.0, 1.0) < case.setting("keep", 0.6, tag)) & (truth != 255)
    prediction = truth.where(kept, case.ints(f"eval/pred_{tag}", shape, k))
    return truth, prediction.masked_fill(prediction == absent, 0) if tag == "voc" else prediction, k


@recorded("vit_metrics")
def test_scores_match_reference_values(case):
    for tag in case.tags():
        labels = recorded_labels(case, tag)
        miou, confusion = scored("miou", *labels), scored("confusion", *labels)
        found = {"pAcc": miou.more["pixel_accuracy"], "mAcc": miou.more["mean_accuracy"], "miou": miou.mean}
        for name, value in (found | miou.per_class | confusion.per_class).items():
            case.compare(f"{tag}/{name}", value, rtol=0, atol=1e-12)

    n, classes = len(case["f1"]), case.setting("f1/classes|f1/num_classes", 20)
    truth = torch.stack([case.arr(f"f1/t{i}", (classes,), 0.0, 1.0) < 0.2 for i in range(n)])
    prediction = torch.stack([case.arr(f"f1/p{i}", (classes,), 0.0, 1.0) < 0.25 for i in range(n)])
    prediction[-2:] = False  # a prediction of nothing, and of nothing where there is nothing
    truth[-1] = False
    case.compare("f1", tag_f1(prediction, truth.float()), rtol=0, atol=1e-15)

    image = case.arr("denorm/x", case["denorm_uint8"].shape)
    white, black = ((torch.tensor(value) - 123.675) / 58.395 for value in (255.0, 0.0))
    image[0, 0, 0, :2] = torch.stack([white, black])
    image.clamp_(-1.8, 2.2)
    found = denormalize(image)
    case.same("denorm_uint8", found.trunc().remainder(256), differing=1e-3)
    case.compare("denorm2", found.trunc().remainder(256) / 255, rtol=0, atol=1e-6)


@recorded("wsfcn_evaluation", "onestage_evaluation")
def test_matches_the_evaluation_of_the_single_stage_cnns(case):
    """Their means count classes that never occur as 0; ours leave them out, so the tables are compared."""
    truth, prediction, k = case["gt"], case["pred"], len(case["confusion"])
    miou, confusion = scored("miou", truth, prediction, k), scored("confusion", truth, prediction, k)
    matrix, per_class = matrix_of(miou.more), miou.per_class | confusion.per_class
    assert torch.equal(matrix.double(), case["confusion"])
    iou, precision, recall = (100 * per_class[x].nan_to_num(0.0) for x in ("iou", "precision", "recall"))
    found = {"iou": iou, "miou_with_bg": iou.mean(), "miou_without_bg": iou[1:].mean(), "jaccard": iou / 100}
    found |= {"jaccard_precision": precision / 100, "jaccard_recall": recall / 100}
    for name, value in found.items():
        case.compare(name, value, rtol=0, atol=1e-9)
    present = matrix.sum(1) > 0
    assert miou.mean == pytest.approx(float(case["iou"][present].mean() / 100), abs=1e-12)

    lines = [line.split("|") for line in case["report"].splitlines() if line.count("|") == 4][1:]
    for i, line in enumerate(lines):
        printed = [float(number) for number in line[2:]]
        assert printed == pytest.approx([float(x[i]) for x in (iou, precision, recall)], abs=0.051)

    matrices = [matrix_of(scored("miou", t[None], p[None], k).more) for t, p in zip(truth, prediction)]
    log = []
    for i, line in enumerate(lines):
        log.append(line[0].strip())
        shown = [n for n, m in enumerate(matrices) if m[i].any()]
        gain = {n: int(3 * m[i, i] - m[i].sum() - m[:, i].sum()) for n, m in enumerate(matrices)}
        log += [f"{gain[n]:05d} | img{n}" for n in sorted(shown, key=lambda n: -gain[n])]
    assert log == case["score_log"].split("\n")[: len(log)]


def percent(iou):
    """SEAM's columns: IoU of every class, 0 for one that never occurs, and their plain mean."""
    iou = 100 * iou.nan_to_num(0.0)
    return torch.cat([iou, iou.mean()[None]])


@recorded("ms_cam_eval")
def test_sweep_and_label_images_match_the_published_programs(case, tmp_path):
    """The numbers of SEAM's and IRN's evaluation programs."""
    thresholds, k = case["thresholds"].tolist(), case["sweep"].shape[1] - 1
    single = {name: int(name[-3:]) / 100 for name in case.starting("irn_iou_")}
    sweep = CamSweep(names(k), thresholds=[*thresholds, *single.values()])
    truth = [case[f"gt_map{i}"] for i in range(len(case.starting("gt_map")))]
    share = case.noted(r"([\d.]+)\*uniform", 0.6)
    for i, mask in enumerate(truth):
        classes = case[f"classes{i}"].sort().values
        maps = [share * case.input(f"cam{i}_{r}") + (1 - share) * (mask == r + 1) for r in classes.tolist()]
        prediction = ImagePrediction()
        prediction.add_cam("cam", torch.stack(maps), classes + 1, mask.shape, thresholds[0])
        sweep.update({"mask": mask}, prediction)
    iou = {t: Miou(names(k)).values(m).per_class["iou"] for t, m in sweep.matrices("cam").items()}
    case.compare("sweep", torch.stack([percent(iou[t]) for t in thresholds]), rtol=0)
    for name, threshold in single.items():
        case.compare(name, iou[threshold].nan_to_num(-1.0), rtol=0)
        case.compare(name.replace("iou", "miou"), iou[threshold].nanmean(), rtol=0)

    records = []
    for i, mask in enumerate(truth):
        write_mask(tmp_path / f"{i}.png", mask)
        records.append(Record(str(i), tmp_path / f"{i}.jpg", tmp_path / f"{i}.png", None))
    evaluation = Evaluation(Split("recorded", names(k), tuple(records)), ["miou"])
    for i, record in enumerate(records):
        evaluation.add(record, ImagePrediction({"seg": case[f"png_pred{i}"]}))
    case.compare("png_eval", percent(evaluation.results["miou"]["seg"].per_class["iou"]), rtol=0)


# Every score, one of your own too, has these properties; K is 4.
CLASSES = ("background", "boat", "sheep", "car")  # context_leak expects those of the scenes
ALL = sorted({path.stem for path in Path(inspect.getfile(Miou)).parent.glob("[a-z]*.py")} - set(NO_SCORES))


def random_images(seed, count=5):
    """Samples with ignored pixels and predictions of every output."""
    draw = torch.Generator().manual_seed(seed)
    for i in range(count):
        size = tuple(torch.randint(4, 20, (2,), generator=draw).tolist())
        mask = torch.randint(5, size, generator=draw)
        prediction = ImagePrediction({"seg": torch.randint(4, size, generator=draw)})
        prediction.class_logits = torch.randn(3, generator=draw)
        prediction.seg_probs = torch.rand(4, *size, generator=draw).clone
        for output in ("cam", "aux_cam"):
            # On the thresholds and between them.
            cam = torch.randint(0, 201, (2, 3, 4), generator=draw) / 200
            prediction.add_cam(output, cam, torch.tensor([1, 3]), size, 0.3)
        sample = {"name": str(i), "mask": mask.masked_fill(mask == 4, 255)}
        sample["context"] = torch.randint(6, size, generator=draw)
        yield sample | {"class_label": torch.tensor([1.0, 0.0, 1.0])}, prediction


@pytest.mark.parametrize("name", ALL)
def test_any_score_adds_up_whatever_the_shares_and_their_order(name):
    whole, *parts = (create_score(name, CLASSES) for _ in range(3))
    for i, (sample, prediction) in enumerate(random_images(0)):
        whole.update(sample, prediction)
        parts[i % 2].update(sample, prediction)
    counted = [tensor.clone() for tensor in whole.tensors()]
    for total, *shares in zip(counted, *(part.tensors() for part in parts), strict=True):
        assert_close(total, sum(shares))
    for sample, prediction in reversed(list(random_images(0))):
        whole.update(sample, prediction)  # once more, the other way round
    for once, twice in zip(counted, whole.tensors(), strict=True):
        assert_close(2 * once, twice)
    first, second = parts[0].compute(), whole.compute()
    assert set(first) == set(second) and all(math.isfinite(values.mean) for values in second.values())
    assert whole.table(second) or name == "tag_f1"


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("tag_f1", "calibration")])
def test_any_score_of_perfect_labels_is_best_and_ignored_pixels_change_nothing(name):
    score, spoilt = create_score(name, CLASSES), create_score(name, CLASSES)
    best = {"confusion": 0.0, "context_leak": 0.0, "errors": 0.0}.get(name, 1.0)
    for sample, _ in random_images(1):
        perfect, other = ImagePrediction(), ImagePrediction()
        for copy, ignored in ((perfect, 0), (other, 2)):
            label = sample["mask"].masked_fill(sample["mask"] == 255, ignored)
            copy.labels["seg"] = label
            copy.cams["cam"] = (0.9 * (label > 0), label)
        score.update(sample, perfect)
        spoilt.update(sample, other)
    (values,), (others,) = score.compute().values(), spoilt.compute().values()
    assert values.mean == pytest.approx(best) == others.mean


def test_undefined_ratios_stay_visible():
    """Class 1 is right, class 2 is predicted but never right, class 3 is missed, class 4 occurs nowhere."""
    labels = torch.tensor([[[1, 1, 3, 1]]]), torch.tensor([[[1, 1, 2, 2]]]), 5
    evaluation = evaluated(["miou", "confusion"], *labels)
    miou, confusion = (evaluation.results[name]["seg"] for name in ("miou", "confusion"))
    _, one, two, three, four = confusion.per_class["confusion"].tolist()
    assert one == 0 and math.isinf(two) and math.isnan(three) and math.isnan(four)
    assert confusion.mean == 0  # over class 1 alone
    assert [math.isnan(v) for v in miou.per_class["iou"].tolist()] == [True, False, False, False, True]
    assert miou.mean == pytest.approx((2 / 3 + 0) / 2)  # classes 1 and 3 occur in the truth

    (record,) = json.loads(json.dumps(evaluation.records({"seg": "seg/x/ss"}, {}, {}), allow_nan=False))
    score = record["score"]
    assert record["protocol"] == "seg/x/ss" and "threshold" not in record
    assert (
        score["per_class"]["class 2"]["confusion"] == "inf" and score["per_class"]["class 4"]["iou"] is None
    )
    assert score["miou_classes"] == 2 and score["confusion_classes"] == 1 and score["pixels"] == 4
    assert score["confused_objects"][0]["truth"] == "class 3"
    assert score["miou"] == miou.mean and torch.equal(
        Miou(names(5)).values(matrix_of(score)).per_class["iou"].isnan(), miou.per_class["iou"].isnan()
    )


def test_record_of_a_cam_says_its_threshold():
    prediction = ImagePrediction()
    prediction.add_cam("cam", torch.ones(1, 2, 2), torch.tensor([1]), (2, 2), 0.3)
    evaluation = Evaluation(Split("test", names(2), (Record("0", None, None, ()),)), ["miou"], threshold=0.3)
    evaluation.update({"name": "0", "mask": torch.ones(2, 2, dtype=torch.int64)}, prediction)
    (record,) = evaluation.records({"cam": "cam/x/ms"}, {}, {})
    assert record["protocol"] == "cam/x/ms@0.30" and record["threshold"] == 0.3


def test_pairs_name_where_the_pixels_of_a_class_went():
    truth = torch.tensor([[[1] * 10 + [2] * 4 + [0] * 2]])
    prediction = torch.tensor([[[1] * 7 + [2] * 3 + [2, 2, 0, 0] + [1, 0]]])
    matrix = matrix_of(scored("miou", truth, prediction, 3).more)
    assert top_confusions(matrix) == [(1, 2, pytest.approx(0.3))]
    assert top_confusions(matrix, foreground=False) == [
        (0, 1, pytest.approx(0.5)),
        (2, 0, pytest.approx(0.5)),
    ]


@pytest.mark.parametrize(
    "truth, label, what",
    [([0, 7], [0, 0], "mask"), ([0, 1], [0, 255], "seg prediction"), ([0, 1], [0, 9], "seg prediction")],
)
def test_label_out_of_range_is_an_error(truth, label, what):
    with pytest.raises(ValueError, match=f"1 pixels of the {what}"):
        evaluated(["miou"], torch.tensor([[truth]]), torch.tensor([[label]], dtype=torch.uint8), 3)


def test_label_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="rows, columns"):
        evaluated(["miou"], torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long(), 3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_sweep_in_one_pass_equals_a_label_for_each_threshold(seed):
    sweep, expected = CamSweep(CLASSES), {t: Miou(CLASSES) for t in CamSweep(CLASSES).thresholds}
    for sample, prediction in random_images(seed, 2):
        sweep.update(sample, prediction)
        score, label = prediction.cams["cam"]
        for threshold, miou in expected.items():
            cut = label.where(score > torch.tensor(threshold), 0)
            miou.update(sample, ImagePrediction({"cam": cut}))
    assert all(torch.equal(m, expected[t].sums[0]) for t, m in sweep.matrices("cam").items())
    found = sweep.compute()["cam@best"]
    assert found.mean == max(found.about["miou_by_threshold"].values())
    assert plain(expected[found.about["threshold"]].compute()["cam"].mean) == found.mean


def planted():
    """A mask, a label, and how many of its wrong pixels have which cause."""
    mask = torch.zeros(40, 60, dtype=torch.int64)
    mask[5:25, 5:25], mask[5:25, 35:55], mask[30:36, 50:56] = 1, 2, 4
    mask[39] = 255
    label = mask.masked_fill(mask == 255, 1)
    label[30:34, 5:15] = 3
    label[30:36, 50:56] = 0
    label[25, 5:25] = 1
    label[15:18, 10:12] = 2
    label[30:33, 20:30] = 1
    label[10:14, 10:14] = 0
    return mask, label, dict(zip(CAUSES, (40, 36, 20, 6, 30, 16), strict=True))


def test_every_planted_error_is_found_and_what_mending_it_would_give():
    mask, label, expected = planted()
    values = scored("errors", mask[None], label[None], 5)
    before = scored("miou", mask[None], label[None], 5).mean
    known = int((mask != 255).sum())
    assert values.mean == pytest.approx(sum(expected.values()) / known)
    for number, (name, count) in enumerate(expected.items(), 1):
        found, wrong = values.more["causes"][name], causes(mask, label) == number
        assert round(found["share"] * known) == count == int(wrong.sum())
        mended = scored("miou", mask[None], mask.where(wrong, label)[None], 5).mean
        assert found["gain"] == pytest.approx(mended - before) and found["gain"] > 0
    objects = (mask != 255) & (mask > 0)
    found = values.more["geometric_recall"], values.more["named_share"]
    assert found[0] == pytest.approx(float((label[objects] > 0).double().mean()))
    assert found[0] * found[1] == pytest.approx(float((label == mask)[objects].double().mean()))
    _, small, large, _ = values.more["recall_by_size"]  # 36 of 2,400 pixels, and two times 400
    assert small == 0 and large == pytest.approx(1 - 22 / 800)


def test_calibration_compares_scores_with_the_share_that_is_right():
    score = create_score("calibration", CLASSES)
    probs = torch.tensor([0.1, 0.1, 0.8, 0.0])[:, None, None].expand(4, 10, 10)
    mask = torch.full((10, 10), 2)
    mask[:6], mask[6:8] = 0, 255  # of the 80 known pixels a quarter is right
    tags = torch.tensor([0.98, 0.02, 0.35])
    seg = {"seg": torch.full((10, 10), 2)}
    prediction = ImagePrediction(seg, class_logits=tags.logit(), seg_probs=lambda: 3 * probs)
    score.update({"mask": mask, "class_label": torch.tensor([0.0, 0.0, 1.0])}, prediction)
    found = score.compute()
    assert found["seg"].mean == pytest.approx(0.8 - 0.25)
    assert found[""].mean == pytest.approx((0.98 + 0.02 + 0.65) / 3)
    assert "0.80, is right in 25 %" in score.table(found)


def square(top, left, side=20, size=(120, 160), k=1):
    mask = torch.zeros(size, dtype=torch.int64)
    mask[top : top + side, left : left + side] = k
    return mask[None]


def boundary(truth, label):
    return scored("boundary_f", truth, label, 3).per_class["boundary_f"]


def test_boundary_score_looks_at_outlines_alone():
    """The tolerance of a 120 x 160 image, whose diagonal is 200, is 1.5: 2 pixels."""
    truth = square(30, 40)
    assert boundary(truth, square(32, 42))[1] == 1.0
    assert boundary(truth, square(33, 43))[1] < 1.0 > boundary(truth, square(34, 44))[1] > 0
    assert boundary(truth, square(90, 120))[1] == 0.0 and boundary(truth, square(30, 40, k=2))[1] == 0.0
    assert boundary(truth, truth)[2].isnan()
    assert boundary(square(30, 40, 1), square(30, 40, 1))[1] == 1.0
    hole = truth.clone()
    hole[:, 36:44, 46:54] = 0  # a false outline, and none of the true one is lost
    assert boundary(truth, hole)[1] == pytest.approx(2 * (76 / 108) / (1 + 76 / 108), abs=0.02)
