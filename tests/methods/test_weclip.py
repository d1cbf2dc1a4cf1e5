"""methods/weclip.py: a step trains the decoder alone, and the attention that agrees with it is chosen."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from engine.config.load import load_config
from methods.weclip import WeCLIP, affinity_loss, agreeing
from tests.clip import SMALL, TEXTS

OPTIONS = {"width": 16, "depth": 1, "heads": 2, "radius": 2, "refiner": {"name": "par", "iterations": 2}}


@pytest.fixture
def method():
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    return WeCLIP(4, SMALL, **TEXTS, **OPTIONS).train()


def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(2, 3, 40, 40, generator=generator),
        "class_label": torch.tensor([[1.0, 0, 1], [0, 1, 0]]),
        "valid_box": torch.tensor([[0, 40, 0, 40], [0, 40, 8, 40]]),
    }


def test_steps_on_one_batch_learn_it_and_leave_clip_alone(method):
    before = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    optimizer, totals = torch.optim.AdamW(method.parameter_groups()[0]["params"], 1e-2), []
    for step in range(8):
        losses, metrics = method(batch(), step)
        total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0] and 0 <= metrics["fg"] <= 1
    assert all(torch.equal(v, before[k]) for k, v in method.backbone.state_dict().items())
    assert not method.backbone.training


def test_predictions_of_any_size_and_pseudo_labels_of_the_tags(method):
    image, tags = torch.randn(2, 3, 30, 44), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    made = method.eval().predict_tagged(image, tags, (1.0,))
    assert made.seg_logits.shape == (2, 4, 4, 6) and made.cam.shape == (2, 3, 30, 44)
    assert made.cam.min() >= 0 and made.cam.max() <= 1 and not made.cam[1].any()
    assert method.predict(image, ()).cam is None
    label = method.decoder_target(image, made, tags, 0)
    assert set(label[0].unique().tolist()) <= {0, 1, 3} and not label[1].any()


def test_blocks_that_agree_are_averaged():
    generator = np.random.default_rng(0)
    attention, affinity = generator.random((5, 2, 6, 6)), generator.random((2, 6, 6))
    found = agreeing(torch.from_numpy(attention), torch.from_numpy(affinity))
    for b in range(2):
        difference = [np.abs(attention[layer, b] - affinity[b]).sum() for layer in range(5)]
        kept = [attention[layer, b] for layer in range(5) if difference[layer] <= np.mean(difference)]
        assert 0 < len(kept) < 5
        assert_close(found[b], torch.from_numpy(np.mean(kept, 0)))


def test_affinity_loss_ignores_unknown_pairs():
    affinity = torch.rand(1, 5, 5, requires_grad=True)
    affinity_loss(affinity, torch.full((1, 5, 5), 255)).backward()
    assert not affinity.grad.any()
    pairs = torch.eye(5)[None].long()
    assert affinity_loss(torch.eye(5)[None], pairs) < affinity_loss(torch.full((1, 5, 5), 0.5), pairs)


def test_config_holds_the_values_of_the_paper():
    cfg = load_config("configs/weclip/voc.yaml")
    assert (cfg.data.crop_size, cfg.train.batch_size, cfg.train.steps, cfg.optim.lr) == (320, 4, 30000, 2e-5)
    assert len(cfg.method.words) == 20 and cfg.method.loss_weights.aff == 0.1
