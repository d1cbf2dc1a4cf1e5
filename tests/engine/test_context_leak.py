"""Context leak: what is planted is measured, and what has nothing to do with contexts is not."""

import pytest
import torch

from datasets.demo.contexts import CONTEXTS
from engine.scores.base import ImagePrediction, create_score

CLASSES = ("background", "boat", "sheep")  # at home on water and on grass
WATER, SAND = CONTEXTS.index("water"), CONTEXTS.index("sand")


def leak(painted_at_home, painted_elsewhere):
    """Per class, of boats on 10 x 10 pixels of water and of sand that are partly painted with the boat."""
    score = create_score("context_leak", CLASSES)
    for context, rows in ((WATER, painted_at_home), (SAND, painted_elsewhere)):
        mask = torch.zeros(12, 10, dtype=torch.int64)
        mask[10:] = 1  # the boat
        label = torch.zeros_like(mask)
        label[:rows] = 1
        maps = torch.full_like(mask, context)
        score.update({"name": "0", "mask": mask, "context": maps}, ImagePrediction({"seg": label}))
    return score.compute()["seg"]


def test_share_of_the_home_context_less_that_of_others():
    values = leak(painted_at_home=7, painted_elsewhere=2)
    torch.testing.assert_close(values.per_class["context_leak"][1].item(), 0.5)
    assert values.mean == pytest.approx(0.5)  # no image shows a sheep


def test_painting_every_context_alike_is_no_leak():
    assert leak(painted_at_home=6, painted_elsewhere=6).mean == 0


def test_an_image_without_a_map_of_contexts_is_refused():
    score = create_score("context_leak", CLASSES)
    label = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="contexts"):
        score.update({"name": "photo", "mask": label}, ImagePrediction({"seg": label}))
