"""PSA's classifier, affinity network and random walk: the authors' values, and promises for any input."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from losses.affinity import PairLabel, pair_affinity_loss, pair_label
from losses.classification import multilabel_loss
from methods.affinitynet import AffinityNet, AffinityView, merge_readings, pair_affinity
from methods.cam import PooledCAMNetwork
from methods.published import PROGRAMS
from ops.cam import background_score, divide_by_maximum, summed_cam
from ops.pairs import PixelPairs
from tests.cams import scored_label
from tests.conftest import GOLDEN
from tests.methods.recorded import assert_recorded_gradients, recorded_network
from utils.cam_files import ScoreFile, load_scores, save_scores

RESNET = {"name": "resnet38d"}
PUBLISHED_KEYS = PROGRAMS["psa_affinity"]["rules"].items()
SMALL = {"name": "resnet38d", "width": 4}
PYRAMID = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48, "pyramid": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def authors(program):
    return list(json.loads((GOLDEN / f"state_dict_psa_{program}.json").read_text())["canonical"])


def recorded_affinity_net(case, num_classes=21):
    return recorded_network(lambda: AffinityNet(num_classes, RESNET), case, PUBLISHED_KEYS, authors("aff"))


def drawn_labels(case):
    """Labels of pairs as the recorded cases draw them."""
    kind = case.input("u").floor()
    return PairLabel(kind == 0, kind == 1, kind == 2)


def weighted(losses):
    return losses["bg_pos"] / 4 + losses["fg_pos"] / 4 + losses["neg"] / 2


# -- the classifier


def test_classifier_matches_the_authors(golden):
    case = golden("ms_psa_cls_net")
    classes = case["logits"].shape[1] + 1
    rules = PROGRAMS["psa_cam"]["rules"].items()
    method = recorded_network(lambda: PooledCAMNetwork(classes, RESNET), case, rules, authors("cls"))
    image, label = case.input("image"), (case.input("label_u") > 0.8).float()
    maps = []
    method.backbone.register_forward_hook(lambda module, inputs, outputs: maps.extend(outputs))
    logits = method.class_logits(image)
    for features, name in zip(maps[1:], ("conv4", "conv5", "conv6"), strict=True):
        assert_close(features.double().mean((2, 3))[:, ::16], case[f"feat_mean_{name}"], **CLOSE)
    assert_close(logits, case["logits"], **CLOSE)
    loss = multilabel_loss(logits, label)
    assert_close(loss, case["loss"], **CLOSE)
    loss.backward()
    assert_recorded_gradients(method, case, rules)
    assert sum(p.grad is not None for p in method.parameters()) == case.meta["n_params_with_grad"]
    assert_close(method.activation_of(image), case["cam"], **CLOSE)


def test_merging_of_scales_matches_the_authors(golden):
    case = golden("ms_psa_cam_merge")
    scales = case.meta["scales"]
    maps = [case.input(f"cam{i}").relu() for i in range(2 * len(scales))]
    pairs = {scale: torch.cat(maps[2 * i : 2 * i + 2]) for i, scale in enumerate(scales)}
    outputs = iter(pairs[scale] for scale in sorted(scales, key=lambda scale: scale != 1.0))
    size = tuple(case.meta["size"])
    (total,) = summed_cam(lambda views: next(outputs), torch.zeros(1, 3, *size), scales, [size])
    cam, label = divide_by_maximum(total), case["label"][None].float()
    present = label[0] > 0
    assert_close(cam[0, present], case["norm_cam"], **TIGHT)
    for name, threshold in (("020", 0.20), ("060", 0.60)):
        assert torch.equal(scored_label(cam, label, threshold)[0], case[f"pred_{name}"].long())
    for key in (key for key in case if key.startswith("bg_alpha")):
        score = background_score(cam[0, present], float(key.removeprefix("bg_alpha")))
        assert_close(score[::2, ::2], case[key], **TIGHT)


# -- the affinity network


def test_labels_match_the_authors(golden):
    case = golden("ms_psa_aff_label")
    volume, jitter = case.input("volume"), case.input("jitter")
    step = jitter.shape[0] // volume.shape[0]
    volume = volume.repeat_interleave(step, 0).repeat_interleave(step, 1) + jitter
    volume[:, :17] = 0
    scores = F.avg_pool2d(volume.permute(2, 0, 1).unflatten(0, (2, -1)), step)
    assert_close(scores.flatten(0, 1).permute(1, 2, 0), case["pooled"], rtol=0, atol=1e-6)
    label = merge_readings(scores)
    assert torch.equal(label, case["label"].long())
    for name, found in pair_label(label[None], PixelPairs(5))._asdict().items():
        assert torch.equal(found[0], case[name] > 0)


def test_loss_matches_reference_values_and_gradient(golden):
    case = golden("ms_psa_aff_loss")
    affinity = case.input("aff").requires_grad_()
    losses = pair_affinity_loss(affinity, drawn_labels(case))
    for name, ours in {"bg": "bg_pos", "fg": "fg_pos", "neg": "neg"}.items():
        assert_close(losses[ours], case[name], **TIGHT)
    total = weighted(losses)
    assert_close(total, case["total"], **TIGHT)
    assert_close(torch.autograd.grad(total, affinity)[0][:, ::4, ::6], case["grad_sub"], **TIGHT)


def test_affinities_match_the_authors(golden):
    case = golden("ms_psa_aff_net")
    method = recorded_affinity_net(case)
    features = method.features(case.input("image"))
    pairs = method.pairs(features.shape[-2:])
    affinity = pair_affinity(features, pairs)
    assert_close(affinity, case["aff"], **CLOSE)
    loss = weighted(pair_affinity_loss(affinity, drawn_labels(case)))
    assert_close(loss, case["loss"], **CLOSE)
    loss.backward()
    assert_recorded_gradients(method, case, PUBLISHED_KEYS, **CLOSE)

    size = features.shape[-2:]
    dense = torch.eye(size.numel())
    source, destination = pairs.indices(tuple(size))
    dense[source.expand_as(destination), destination] = affinity[0].detach()
    dense = torch.maximum(dense, dense.T)
    assert_close(dense[::3, ::3], case["dense_sub"], **CLOSE)


def test_random_walk_matches_the_authors(golden):
    case = golden("ms_psa_random_walk")
    method = recorded_affinity_net(case).eval()
    image, keys = case.input("image"), sorted(case.meta["keys"])
    size = tuple(image.shape[-2:])
    cam = torch.cat(
        [F.interpolate(case.input(f"cam_{k}"), size, mode="bilinear", align_corners=True)[0] for k in keys]
    )
    class_ids = torch.tensor(keys) + 1
    padded = F.pad(image, (0, -size[1] % method.stride, 0, -size[0] % method.stride))
    with torch.no_grad():
        features = method.features(padded)
    method.features = lambda image: features  # of one image, for all settings of the walk
    for key in (key for key in case if key.startswith("rw_")):
        numbers = [int(part[1:]) for part in key.split("_")[1:]]
        method.alpha, method.beta, method.exp_times = numbers
        assert_close(method.walk(image, cam), case[key], **CLOSE)
        scores = method.propagate(image, cam)
        label = F.pad(class_ids, (1, 0))[scores.argmax(0)]
        assert (label == case[key.replace("rw", "label")]).float().mean() >= 0.999


# -- any input


def small_batch(labels, size=96):
    """Two images, and labels at stride 8 whose colour they have."""
    labels = torch.as_tensor(labels).expand(2, size // 8, size // 8)
    image = F.interpolate(labels[:, None].float(), scale_factor=8).expand(-1, 3, -1, -1)
    return {"image": image / 255 + 0.05 * torch.randn(2, 3, size, size), "pseudo_label": labels}


def halves():
    """Background on the left, then ignored positions, then one class."""
    label = torch.zeros(12, 12, dtype=torch.int64)
    label[:, 5:] = 255
    label[:, 6:] = 1
    return label


@pytest.mark.parametrize("backbone", [SMALL, PYRAMID], ids=["resnet38d", "vit pyramid"])
def test_it_learns_which_pixels_belong_together(backbone):
    torch.manual_seed(0)
    method = AffinityNet(4, backbone, branch_dims=(8, 8, 16))
    batch = small_batch(halves())
    batch["image"][:, :, :, 48:] += 1
    optimizer = torch.optim.Adam([{"params": g["params"]} for g in method.parameter_groups()], lr=3e-3)
    totals = []
    for step in range(12):
        losses, _ = method(batch, step)
        total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert set(losses) == {"bg_pos", "fg_pos", "neg"} and totals[-1] < 0.7 * totals[0]


@pytest.mark.parametrize("value", [0, 2, 255])
def test_labels_of_one_kind_give_finite_losses(value):
    method = AffinityNet(4, SMALL, branch_dims=(4, 4, 4))
    losses, _ = method(small_batch(value), 0)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_gradient_of_affinities_is_that_of_the_formula():
    pairs = PixelPairs(3)
    features = torch.randn(2, 5, 6, 8, dtype=torch.float32, requires_grad=True)
    weight = torch.rand(2, 12, 16)
    found = torch.autograd.grad((pair_affinity(features, pairs) * weight).sum(), features)[0]
    difference = pairs.destination(features) - pairs.source(features)[..., None, :]  # (B, D, R, N)
    expected = torch.autograd.grad(((-difference.abs().mean(1)).exp() * weight).sum(), features)[0]
    assert_close(found, expected)


@pytest.mark.parametrize("size", [(40, 150), (61, 45), (8, 8)])
@pytest.mark.parametrize("classes", [1, 3])
def test_walk_stays_within_its_scores_at_any_size(size, classes):
    torch.manual_seed(0)
    method = AffinityNet(4, SMALL, branch_dims=(4, 4, 4), exp_times=2).eval()
    cam = torch.rand(classes, size[0] // 2, size[1] // 2)
    scores = method.propagate(torch.randn(1, 3, *size), cam)
    assert scores.shape == (1 + classes, *size)
    assert scores.ge(0).all() and scores.le(1 + 1e-5).all()


def test_walk_carries_scores_over_similar_pixels_only():
    method = AffinityNet(4, SMALL, branch_dims=(4, 4, 4), alpha=1, exp_times=6).eval()
    method.features = lambda image: 4.0 * (torch.arange(16) >= 8).expand(1, 3, 16, 16)
    cam = torch.zeros(1, 128, 128)
    cam[:, 56:72, 40:56] = 1
    walked = method.walk(torch.zeros(1, 3, 128, 128), cam)[1]
    assert walked[:12, 4:8].min() > 0.01 and walked[:, 8:].max() < 1e-6


def test_new_layers_learn_ten_times_as_fast():
    method = AffinityNet(4, PYRAMID, branch_dims=(4, 4, 4))
    groups = {group["name"]: group for group in method.parameter_groups()}
    assert {name: (g["lr_scale"], g["decay_scale"]) for name, g in groups.items()} == {
        "backbone_weight": (1, 1),
        "backbone_bias": (2, 0),
        "new_weight": (10, 1),
    }
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)


def test_published_network_has_the_published_groups(golden):
    sizes = golden("ms_psa_cls_net").meta["group_sizes_after_train"]
    with torch.device("meta"):
        groups = AffinityNet(21, RESNET).parameter_groups()
    assert [(g["name"], len(g["params"])) for g in groups] == [
        ("backbone_weight", sizes[0]),
        ("new_weight", 4),
    ]


# -- its training images


def scored_sample(size=(30, 50)):
    """An image whose red channel is its label, and scores that say the same."""
    label = torch.zeros(size, dtype=torch.int64)
    label[:, 24:] = 1
    red = (100 * label).to(torch.uint8)
    scores = F.one_hot(label, 2).permute(2, 0, 1).float()
    image = torch.stack([red, torch.zeros_like(red), torch.zeros_like(red)])
    return {
        "name": "a",
        "image": Image.fromarray(image.permute(1, 2, 0).numpy()),
        "label_scores": {"scores": torch.stack([scores, scores]).half().numpy()},
    }


def test_labels_follow_the_image_and_padding_is_ignored():
    view = AffinityView(64, 8)
    view.jitter = lambda image: image
    mirrored = set()
    for seed in range(8):
        torch.manual_seed(seed)
        sample = view(scored_sample())
        image, label, box = sample["image"], sample["pseudo_label"], sample["valid_box"]
        assert image.shape == (3, 64, 64) and label.shape == (8, 8) and "label_scores" not in sample
        inside = torch.zeros(64, 64)
        y0, y1, x0, x1 = box.tolist()
        inside[y0:y1, x0:x1] = 1
        inside = F.max_pool2d(inside[None], 8)[0] > 0
        assert torch.equal(label != 255, inside)
        # Half of a block in the class's colour makes it the class's.
        share = F.avg_pool2d((image[:1] > image.min() + 0.5).float(), 8)[0]
        area = F.avg_pool2d(F.pad(torch.ones(1, y1 - y0, x1 - x0), (x0, 64 - x1, y0, 64 - y1)), 8)[0]
        sure = inside & ((share - area / 2).abs() > 0.01)
        assert torch.equal(label[sure] == 1, (share > area / 2)[sure])
        mirrored.add(bool(label[inside][0] == 1))
    assert mirrored == {True, False}


def test_scores_survive_their_file(tmp_path):
    written = ScoreFile(torch.tensor([3, 20]), torch.rand(2, 3, 9, 7))
    save_scores(tmp_path / "a.npz", written)
    read = load_scores(tmp_path / "a.npz")
    assert torch.equal(read.class_ids, written.class_ids)
    assert_close(read.scores, written.scores, rtol=0, atol=1e-3)


def test_missing_and_foreign_scores_are_named():
    sample = scored_sample()
    with pytest.raises(ValueError, match="'a' comes without label scores: set data.label_dir"):
        AffinityView(64, 8)({"name": "a", "image": sample["image"]})
    sample["label_scores"]["scores"] = sample["label_scores"]["scores"][..., :20]
    with pytest.raises(ValueError, match=r"image 'a' are \(30, 20\), but the image is \(30, 50\)"):
        AffinityView(64, 8)(sample)
    with pytest.raises(ValueError, match="not a positive multiple of the stride 8"):
        AffinityView(60, 8)
