"""models/refiners/mask_vote.py: exact masks recover the truth, worse masks give worse labels."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from models.refiners.base import create_refiner
from models.refiners.mask_vote import parts, read_masks, vote

H, W = 48, 64


def scene(seed):
    """Four objects of three classes on background, and a mask for each of the five."""
    generator = np.random.default_rng(seed)
    truth, instance = np.zeros((H, W), np.int64), np.zeros((H, W), np.int64)
    y, x = np.mgrid[:H, :W]
    for i, (cy, cx) in enumerate([(12, 16), (12, 48), (36, 16), (36, 48)], 1):
        a, b = generator.uniform(7, 11, 2)
        inside = ((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1
        instance[inside], truth[inside] = i, 1 + i % 3
    return truth, parts(instance), generator


def noisy(truth, share, generator):
    """The truth with a share of its 4 x 4 blocks replaced by classes at random."""
    blocks = generator.random((H // 4, W // 4)) < share
    drawn = generator.integers(0, 4, (H // 4, W // 4))
    return np.where(np.kron(blocks, np.ones((4, 4), bool)), np.kron(drawn, np.ones((4, 4), int)), truth)


def miou(truth, label):
    return np.mean(
        [((truth == k) & (label == k)).sum() / ((truth == k) | (label == k)).sum() for k in range(4)]
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.15))
def test_exact_masks_recover_the_truth(seed, share):
    truth, masks, generator = scene(seed)
    assert np.array_equal(vote(noisy(truth, share, generator), masks), truth)


def test_more_noise_gives_worse_labels():
    """Mean over scenes: of blocks in the label with exact masks, and of masks that are shifted."""
    by_label, by_masks = [], []
    for share in (0.0, 0.5, 0.7, 0.9):
        scenes = [scene(seed) for seed in range(30)]
        by_label.append(np.mean([miou(t, vote(noisy(t, share, g), m)) for t, m, g in scenes]))
    for shift in (0, 2, 4, 6):
        shifted = [(t, parts(np.roll(index_of(m), shift, 1))) for t, m, _ in map(scene, range(10))]
        by_masks.append(np.mean([miou(t, vote(t, m)) for t, m in shifted]))
    for found in (by_label, by_masks):
        assert found[0] == 1 and all(a > b for a, b in itertools.pairwise(found)), found


def index_of(masks):
    index = np.zeros(H * W, np.int64)
    for i, pixels in enumerate(masks):
        index[pixels] = i
    return index.reshape(H, W)


def test_the_rule():
    label = np.array([[1, 1, 0, 0, 2, 2, 255, 0]])
    voted = lambda *masks, **options: vote(label, [np.array(m) for m in masks], **options)[0].tolist()  # noqa: E731
    assert voted() == label[0].tolist()  # what no mask covers
    assert voted([0, 1, 2]) == [1, 1, 1, 0, 2, 2, 255, 0]  # more than half is inside
    assert voted([1, 2], inside=0.6) == [1, 0, 0, 0, 2, 2, 255, 0]  # no class takes it
    # Covers all of class 2, ignored pixels with it.
    assert voted([2, 3, 4, 5, 6, 7]) == [1, 1, 2, 2, 2, 2, 2, 2]
    assert voted([2, 3, 4, 5, 6, 7], covers=None) == [1, 1, 0, 0, 0, 0, 255, 0]
    assert voted([0, 1, 2, 4], [2, 4, 5]) == [1, 1, 2, 0, 2, 2, 255, 0]  # the surer of two masks wins


def test_every_file_format_gives_the_same_masks(tmp_path):
    index = np.zeros((6, 8), np.int64)
    index[1:4, 2:5], index[4:, 6:] = 1, 2
    masks = [index == 1, index == 2]
    codes = [coco.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
    annotations = [{"segmentation": {**code, "counts": code["counts"].decode()}} for code in codes]
    lengths = [{"segmentation": {"size": [6, 8], "counts": run_lengths(m)}} for m in masks]
    corners = [{"segmentation": [[2, 1, 5, 1, 5, 4, 2, 4]]}, annotations[1]]
    for name, content in {"a": annotations, "b": {"annotations": lengths}, "c": corners}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    np.savez(tmp_path / "d.npz", masks=np.stack(masks)[:, None])
    np.savez(tmp_path / "e.npz", segments=index)
    Image.fromarray(index.astype(np.uint8)).save(tmp_path / "f.png")
    Image.fromarray(index.astype(np.uint16).repeat(2, 0).repeat(2, 1)).save(tmp_path / "g.png")
    for name in "abcdefg":
        found = list(read_masks(tmp_path, name, (6, 8)))
        assert [f.tolist() for f in found] == [np.flatnonzero(m).tolist() for m in masks], name
    with pytest.raises(FileNotFoundError, match="h"):
        list(read_masks(tmp_path, "h", (6, 8)))
    with pytest.raises(ValueError, match="masks of"):
        list(read_masks(tmp_path, "f", (8, 6)))
    (tmp_path / "i.json").write_text("[1]")
    with pytest.raises(ValueError, match="damaged"):
        list(read_masks(tmp_path, "i", (6, 8)))


def run_lengths(mask):
    """Lengths of runs down the columns, zeros first."""
    flat = mask.flatten("F")
    ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
    return np.diff([0, *ends, flat.size]).tolist()


def test_scores_are_exchanged_where_the_vote_changes_them(tmp_path):
    truth, masks, generator = scene(0)
    np.savez(tmp_path / "x.npz", segments=index_of(masks))
    refiner = create_refiner("mask_vote", masks=tmp_path)
    with pytest.raises(ValueError, match="name"):
        refiner.refine(torch.rand(1, 3, H, W), torch.rand(1, 4, H, W))
    label = torch.from_numpy(noisy(truth, 0.2, generator))
    scores = torch.nn.functional.one_hot(label, 4).movedim(-1, 0)[None] * 0.5 + torch.rand(1, 4, H, W) * 0.1
    refined = refiner.of_image("x").refine(torch.rand(1, 3, H, W), scores)
    assert np.array_equal(
        refined[0].argmax(0).numpy(), vote(label.numpy(), list(read_masks(tmp_path, "x", (H, W))))
    )
    assert torch.equal(refined.sort(1).values, scores.sort(1).values)


@pytest.mark.parametrize("kind", ["felzenszwalb", {"name": "slic", "n_segments": 60}])
def test_superpixels_straighten_a_ragged_border(kind):
    pytest.importorskip("skimage")
    truth, _, generator = scene(1)
    image = torch.from_numpy(np.random.default_rng(0).random((4, 3)))[truth].movedim(-1, 0)[None].float()
    label = noisy(truth, 0.25, generator)
    scores = torch.nn.functional.one_hot(torch.from_numpy(label), 4).movedim(-1, 0)[None].float()
    voted = create_refiner("mask_vote", superpixels=kind).refine(image, scores)[0].argmax(0).numpy()
    assert miou(truth, voted) > miou(truth, label) + 0.1
