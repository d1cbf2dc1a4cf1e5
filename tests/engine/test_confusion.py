"""Scores from the confusion matrix."""

import json
import math

import pytest
import torch

from engine.scores.confusion import ConfusionMatrix, SegScores, ThresholdSweep, tag_f1
from tests.recorded import recorded
from utils.image import denormalize

SHAPES = {"voc": (21, (3, 40, 50)), "coco": (81, (2, 60, 40))}


def labels(case, tag):
    """Truth and prediction of a recorded case; a class never occurs in the truth, and for voc in neither."""
    k, shape = SHAPES.get(tag, SHAPES["voc"])
    k = case.setting("classes|num_classes|k", len(case[f"{tag}/iou"]), tag)
    shape, absent = (
        case.setting("shape", shape, tag),
        case.setting("absent_class|absent|missing_class", 5, tag),
    )
    truth = case.ints(f"eval/gt_{tag}", shape, k + 3)
    truth = truth.masked_fill((truth >= k) | (truth == absent), 255)
    kept = (case.arr(f"eval/keep_{tag}", shape, 0.0, 1.0) < case.setting("keep", 0.6, tag)) & (truth != 255)
    prediction = truth.where(kept, case.ints(f"eval/pred_{tag}", shape, k))
    return truth, prediction.masked_fill(prediction == absent, 0) if tag == "voc" else prediction, k


def matrix_of(truth, prediction, k):
    matrix = ConfusionMatrix(k)
    for t, p in zip(truth, prediction):
        matrix.update(t, p)
    return matrix


@recorded("vit_metrics")
def test_scores_match_reference_values(case):
    for tag in case.tags():
        scores = matrix_of(*labels(case, tag)).scores()
        found = {
            "pAcc": scores.pixel_accuracy,
            "mAcc": scores.mean_accuracy,
            "miou": scores.miou,
            "iou": scores.iou,
            "precision": scores.precision,
            "recall": scores.recall,
            "confusion": scores.confusion,
        }
        for name, value in found.items():
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
    scores = matrix_of(truth, prediction, k).scores()
    assert torch.equal(scores.matrix.double(), case["confusion"])
    iou, precision, recall = (100 * x.nan_to_num(0.0) for x in (scores.iou, scores.precision, scores.recall))
    found = {"iou": iou, "miou_with_bg": iou.mean(), "miou_without_bg": iou[1:].mean(), "jaccard": iou / 100}
    found |= {"jaccard_precision": precision / 100, "jaccard_recall": recall / 100}
    for name, value in found.items():
        case.compare(name, value, rtol=0, atol=1e-9)
    present = scores.matrix.sum(1) > 0
    assert scores.miou == pytest.approx(float(case["iou"][present].mean() / 100), abs=1e-12)

    lines = [line.split("|") for line in case["report"].splitlines() if line.count("|") == 4][1:]
    for i, line in enumerate(lines):
        printed = [float(number) for number in line[2:]]
        assert printed == pytest.approx([float(x[i]) for x in (iou, precision, recall)], abs=0.051)

    matrices = [matrix_of(t[None], p[None], k).scores().matrix for t, p in zip(truth, prediction)]
    log = []
    for i, line in enumerate(lines):
        log.append(line[0].strip())
        shown = [n for n, m in enumerate(matrices) if m[i].any()]
        gain = {n: int(3 * m[i, i] - m[i].sum() - m[:, i].sum()) for n, m in enumerate(matrices)}
        log += [f"{gain[n]:05d} | img{n}" for n in sorted(shown, key=lambda n: -gain[n])]
    assert log == case["score_log"].split("\n")[: len(log)]


def test_f1_of_logits_takes_those_above_zero():
    logits = torch.tensor([[0.1, 0.0, -3.0]])
    assert tag_f1(logits, torch.tensor([[1.0, 0.0, 0.0]])).tolist() == [1.0]
    assert tag_f1(logits, torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [0.5]


def test_scores_do_not_depend_on_how_the_pixels_are_dealt_out():
    truth, prediction = torch.randint(0, 4, (2, 6, 10, 10)).unbind()
    whole, parts = ConfusionMatrix(4), [ConfusionMatrix(4), ConfusionMatrix(4)]
    whole.update(truth, prediction)
    for i in range(6):
        parts[i % 2].update(truth[i].to(torch.uint8), prediction[i].to(torch.int32))
    assert torch.equal(whole.counts, parts[0].counts + parts[1].counts)


def test_memory_does_not_grow_with_the_number_of_images():
    matrix = ConfusionMatrix(3)
    size = matrix.counts.numel()
    for _ in range(5):
        matrix.update(torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.uint8))
    assert matrix.counts.numel() == size
    assert matrix.scores().matrix.tolist() == [[0, 80, 0], [0, 0, 0], [0, 0, 0]]


def test_undefined_ratios_stay_visible():
    """Class 1 is right, class 2 is predicted but never right, class 3 is missed, class 4 occurs nowhere."""
    truth = torch.tensor([1, 1, 3, 1])
    scores = matrix_of(truth[None], torch.tensor([[1, 1, 2, 2]]), 5).scores()
    confusion = scores.confusion.tolist()
    assert (
        confusion[1] == 0
        and math.isinf(confusion[2])
        and math.isnan(confusion[3])
        and math.isnan(confusion[4])
    )
    assert scores.mean_confusion == 0  # over class 1 alone
    assert [math.isnan(v) for v in scores.iou.tolist()] == [True, False, False, False, True]
    assert scores.miou == pytest.approx((2 / 3 + 0) / 2)  # classes 1 and 3 occur in the truth


def test_ignored_pixels_change_nothing():
    truth, prediction = torch.tensor([[0, 1, 255, 255]]), torch.tensor([[0, 1, 1, 200]])
    assert matrix_of(truth, prediction, 2).scores().miou == 1.0


def test_truth_that_ignores_its_objects_is_recognised():
    for truth, lacks in (
        ([0, 255], True),
        ([0, 1, 255], False),
        ([0, 0], False),
        ([255], True),
        ([2], False),
    ):
        assert matrix_of(torch.tensor([truth]), torch.ones(1, len(truth)).long(), 3).lacks_classes == lacks


@pytest.mark.parametrize(
    "truth, prediction, which", [([0, 7], [0, 0], "ground truth"), ([0, 1], [0, 255], "prediction")]
)
def test_label_out_of_range_is_an_error(truth, prediction, which):
    matrix = matrix_of(torch.tensor([truth]), torch.tensor([prediction]), 3)
    with pytest.raises(ValueError, match=f"1 pixels of the {which}"):
        matrix.scores()


def test_labels_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix(2).update(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        ConfusionMatrix(2).update(torch.zeros(2), torch.zeros(2))


def test_pairs_name_where_the_pixels_of_a_class_went():
    truth = torch.tensor([1] * 10 + [2] * 4 + [0] * 2)
    prediction = torch.tensor([1] * 7 + [2] * 3 + [2, 2, 0, 0] + [1, 0])
    scores = matrix_of(truth[None], prediction[None], 3).scores()
    assert scores.top_confusions() == [(1, 2, pytest.approx(0.3))]
    assert scores.top_confusions(foreground=False) == [(0, 1, pytest.approx(0.5)), (2, 0, pytest.approx(0.5))]


def test_record_survives_json_with_undefined_values():
    truth, prediction = torch.tensor([[1, 1, 3]]), torch.tensor([[1, 2, 2]])
    scores = matrix_of(truth, prediction, 5).scores()
    names = ["background", "a", "b", "c", "d"]
    record = json.loads(json.dumps(scores.to_dict(names), allow_nan=False))
    assert record["per_class"]["b"]["confusion"] == "inf" and record["per_class"]["d"]["iou"] is None
    assert record["miou_classes"] == 2 and record["confusion_classes"] == 1
    again = SegScores.from_dict(record)
    assert torch.equal(again.matrix, scores.matrix) and again.miou == scores.miou


def test_sweep_in_one_pass_equals_a_matrix_for_each_threshold():
    generator = torch.Generator().manual_seed(0)
    thresholds = [0.3, 0.0, 0.15, 0.59]
    sweep, expected = ThresholdSweep(4, thresholds), {t: ConfusionMatrix(4) for t in thresholds}
    for size in ((7, 9), (1, 5)):
        truth = torch.randint(5, size, generator=generator)
        truth[truth == 4] = 255
        label = torch.randint(1, 4, size, generator=generator)
        score = torch.randint(0, 61, size, generator=generator) / 100  # on the thresholds and between them
        sweep.update(truth, label, score)
        for threshold, matrix in expected.items():
            matrix.update(truth, label.where(score > threshold, 0))
    found = sweep.reduce().scores()
    assert list(found) == sorted(thresholds)
    assert all(torch.equal(found[t].matrix, expected[t].scores().matrix) for t in thresholds)
    sweep = ThresholdSweep(4, thresholds)
    sweep.update(torch.tensor([[7]]), torch.tensor([[1]]), torch.tensor([[0.5]]))
    with pytest.raises(ValueError, match="ground truth"):
        sweep.scores()
