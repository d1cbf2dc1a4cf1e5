"""The validation that runs during training: scores on a split, as the single-stage trainers do."""

from collections.abc import Iterable
from itertools import islice

import torch

from datasets.base import Sample, WeakSegDataset
from datasets.loader import eval_loader
from engine.details import Details
from engine.scores.base import OUTPUTS, ImagePrediction
from engine.scores.evaluation import SCORES, Evaluation
from engine.scores.records import protocol_id
from methods.base import Method, Prediction, Predicts
from utils.distributed import is_main, shard
from utils.image import normalize, resize
from utils.logging import progress_bar
from utils.precision import autocast


@torch.no_grad()
def validate(
    method: Method,
    dataset: WeakSegDataset,
    *,
    size: int,
    device: torch.device | str,
    scores: Iterable[str] = SCORES,
    num_workers: int = 0,
    precision: str = "fp32",
    batch_size: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score CAM, auxiliary CAM, segmentation and tags, whichever the method predicts.

    Every image is resized to a square of ``size`` pixels whatever its aspect ratio, predicted once, and the
    maps are resized (bilinear, no corner alignment) to the size of its mask. A CAM becomes a label by taking
    the strongest class among the true tags where it exceeds ``method.background_threshold``. Processes share
    the images, and each returns the scores of the whole split. The method is put in eval mode and back.
    Images whose tags are unknown count for the segmentation only.

    Args:
        dataset: without a transform and with masks.
        batch_size: images per forward pass; changes the speed, not the scores. None: 1 on a CPU, 8 on a GPU.
    """
    assert isinstance(method, Predicts)
    device = torch.device(device)
    evaluation = Evaluation(dataset.split, scores, method.background_threshold, device)
    evaluation.scores = [score for score in evaluation.scores if score.validates]
    evaluation.details = Details(dataset.split, device)
    loader = eval_loader(dataset, num_workers, shard(len(dataset)))
    bar = progress_bar(loader, desc="validate", unit="img", leave=False, disable=not (progress and is_main()))
    was_training = method.training
    method.eval()
    try:
        samples, count = iter(bar), batch_size or (8 if device.type == "cuda" else 1)
        while chunk := list(islice(samples, count)):
            image = torch.cat([resize(normalize(s["image"].to(device))[None], (size, size)) for s in chunk])
            with autocast(device, precision):
                out = method.predict(image, method.cam_scales)
            for i, sample in enumerate(chunk):
                sample |= {
                    key: sample[key].to(device) for key in ("mask", "class_label", "context") if key in sample
                }
                evaluation.update(sample, predicted_image(method, out, i, sample))
    finally:
        method.train(was_training)
    return evaluation.reduce()


def predicted_image(method: Method, out: Prediction, i: int, sample: Sample) -> ImagePrediction:
    """Image ``i`` of a prediction at the size of ``sample["image"]``; CAMs need its tags."""
    size = sample["image"].shape[-2:]
    found = ImagePrediction(class_logits=out.class_logits[i])
    if "class_label" in sample:
        class_ids = sample["class_label"].nonzero()[:, 0] + 1
        for output, cam in (("cam", out.cam), ("aux_cam", out.aux_cam)):
            if cam is not None:
                present = cam[i, class_ids - 1].float()
                found.add_cam(output, present, class_ids, size, method.background_threshold)
    if out.seg_logits is not None:
        scores = resize(out.seg_logits[i : i + 1].float(), size)
        scores = method.finish_scores(scores, out.class_logits[None, i : i + 1].float())
        found.labels["seg"] = scores.argmax(1)[0]
        found.seg_probs = lambda: method.crf_probs(scores)[0]
    return found


def protocols(method: Method, split: str) -> dict[str, str]:
    """Protocol id of every output of a validation."""
    return {
        output: protocol_id(output, split, (1.0,) if output == "seg" else method.cam_scales)
        for output in OUTPUTS
    }
