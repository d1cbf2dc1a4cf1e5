"""What holds for any input: of CAMs, labels, scores, schedules, the random walk and the filter.

Those of transforms and tag tables are in tests/datasets. ``bash run_tests.sh --all`` draws 1,000 inputs each.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from engine.optim import poly_warmup_factor
from engine.scores.base import confusion_matrix
from models.refiners.random_walk import random_walk, transition_weights
from ops.cam import multi_scale_cam, normalize_cam, present_classes
from ops.labels import affinity_label, cam_to_confident_label, threshold_label
from ops.lattice import PermutohedralLattice, bilateral_features
from ops.pairs import PixelPairs, fitting_radius
from utils.schedule import Schedule

seeds, sides = st.integers(0, 2**31), st.integers(2, 12)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), sides, sides)


def rand(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def check(*strategies):
    """A property of a few inputs, or of many at length."""

    def test_of(prove):
        def test(at_length):
            draw = settings(max_examples=1000 if at_length else 10, derandomize=not at_length, deadline=None)

            draw(given(*strategies)(prove))()

        test.__doc__ = prove.__doc__
        return test

    return test_of


@check(seeds, shapes, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_a_normalised_cam_is_in_range_whatever_scale_and_offset(seed, shape, scale, offset):
    cam = rand(seed, *shape)
    stretched = normalize_cam(cam * scale + offset)
    assert stretched.amin() >= 0 and stretched.amax() <= 1
    assert_close(normalize_cam(cam + 1), normalize_cam(cam), rtol=1e-3, atol=1e-3)


@check(seeds, shapes, st.lists(st.sampled_from([0.5, 0.75, 1.5, 2.0]), max_size=2))
def test_a_mirrored_image_has_the_mirrored_cam(seed, shape, scales):
    image = rand(seed, shape[0], 3, *shape[2:])
    (here,), (there,) = (multi_scale_cam(lambda x: (x - 0.5,), x, scales) for x in (image, image.flip(-1)))
    assert_close(there.flip(-1), here, rtol=1e-4, atol=1e-5)


@check(seeds, shapes, st.floats(0, 1), st.floats(0, 1))
def test_labels_hold_tags_alone_and_shrink_with_the_threshold(seed, shape, one, other):
    cam, tags = rand(seed, *shape), (rand(seed + 1, *shape[:2]) < 0.5).float()
    low, high = sorted((one, other))
    present = present_classes(tags)
    label = cam_to_confident_label(present.select(cam), present.label, low, high, present.class_ids)
    for found, image_tags in zip(label, tags):
        assert set(found.unique().tolist()) <= {0, 255, *(image_tags.nonzero()[:, 0] + 1).tolist()}
    score = cam.amax(1)
    few, many = (threshold_label(score, torch.ones_like(score), t) for t in (high, low))
    assert (few <= many).all()


@check(seeds, sides, sides)
def test_affinity_is_symmetric_and_follows_permutations(seed, h, w):
    label = (4 * rand(seed, 1, h, w)).long()
    label[label == 3] = 255
    affinity = affinity_label(label)
    assert torch.equal(affinity, affinity.transpose(1, 2))
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))
    moved = affinity_label(label.flatten(1)[:, order].view(1, h, w))
    assert torch.equal(moved, affinity[:, order][:, :, order])


@check(seeds, sides, sides, st.integers(2, 255))
def test_a_confusion_matrix_counts_every_known_pixel_once(seed, h, w, classes):
    mask, label = ((classes * rand(seed + k, h, w)).long() for k in (0, 1))
    mask[0, 0] = 255
    matrix = confusion_matrix(mask, label, classes)
    assert matrix.sum() == h * w - 1
    assert torch.equal(confusion_matrix(label, label, classes).diagonal().sum(), torch.tensor(h * w))
    known = torch.where(mask == 255, label, mask)
    assert torch.equal(confusion_matrix(known, label, classes), confusion_matrix(label, known, classes).T)


@check(st.lists(st.integers(1, 1000), min_size=1, max_size=5, unique=True), st.integers(0, 2000))
def test_a_schedule_has_the_value_of_the_last_start(starts, step):
    starts = [0, *sorted(starts)]
    schedule = Schedule([[start, k] for k, start in enumerate(starts)])
    assert schedule(step) == sum(start <= step for start in starts) - 1


@check(st.integers(2, 1000), st.integers(0, 100), st.floats(0, 1), st.floats(0.1, 2))
def test_a_learning_rate_rises_in_the_warm_up_and_falls_to_nothing(steps, warmup, ratio, power):
    options = {"steps": steps, "warmup_steps": min(warmup, steps - 1), "warmup_ratio": ratio, "power": power}
    rates = [poly_warmup_factor(step, **options) for step in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    after = rates[options["warmup_steps"] :]
    assert after == sorted(after, reverse=True)


@check(seeds, st.integers(7, 12), st.integers(7, 12), st.integers(2, 4), st.integers(0, 4))
def test_a_walk_averages_scores(seed, h, w, radius, exp_times):
    pairs = PixelPairs(fitting_radius(radius, (h, w)))
    rows, columns = pairs.grid((h, w))
    affinity = rand(seed, len(pairs.directions), rows * columns)
    weights, _ = transition_weights(affinity, pairs, (h, w), beta=2.0)
    assert_close(weights.sum(0), torch.ones(h, w))
    scores = rand(seed + 1, 2, h, w)
    walked = random_walk(scores, affinity, pairs, 2.0, exp_times)
    assert walked.min() >= scores.min() - 1e-5 and walked.max() <= scores.max() + 1e-5


@check(seeds, st.integers(4, 16), st.integers(4, 16), st.floats(1, 50), st.floats(1, 100))
def test_a_normalised_filter_keeps_constants_and_ranges(seed, h, w, sigma_xy, sigma_rgb):
    image = 255 * rand(seed, 1, 3, h, w)
    lattice = PermutohedralLattice(bilateral_features(image, sigma_xy, sigma_rgb))
    values = rand(seed + 1, 1, h * w, 2)
    weight = lattice.filter(torch.ones(1, h * w, 1))
    filtered = lattice.filter(values) / weight
    assert (filtered >= values.min() - 1e-4).all() and (filtered <= values.max() + 1e-4).all()
    assert_close(lattice.filter(torch.full((1, h * w, 1), 3.0)) / weight, torch.full((1, h * w, 1), 3.0))
