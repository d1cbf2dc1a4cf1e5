"""PSA's classifier, affinity network and random walk: the authors' values, and promises for any input."""

import torch
import torch.nn.functional as F
from PIL import Image

from losses.affinity import PairLabel, pair_affinity_loss, pair_label
from losses.classification import multilabel_loss
from methods.affinitynet import AffinityNet, AffinityView, merge_readings, pair_affinity
from methods.cam import PooledCAMNetwork
from ops.cam import background_score, divide_by_maximum, summed_cam
from ops.pairs import PixelPairs
from tests.cams import scored_label
from tests.methods.recorded import check_gradients, class_labels, radius_of, recorded_network, scale_pairs
from tests.recorded import GOLDEN, GoldenCase, recorded

RESNET = {"name": "resnet38d"}
SMALL = {"name": "resnet38d", "width": 4}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def recorded_affinity_net(case, dtype=torch.float64):
    return recorded_network(lambda: AffinityNet(21, RESNET), case, "psa_affinity", dtype)


def drawn_labels(case):
    """Labels of pairs as the recorded cases draw them."""
    kind = case.input("u").floor()
    return PairLabel(kind == 0, kind == 1, kind == 2)


def weighted(losses):
    return losses["bg_pos"] / 4 + losses["fg_pos"] / 4 + losses["neg"] / 2


# -- the classifier


@recorded("ms_psa_cls_net")
def test_classifier_matches_the_authors(case):
    classes = case["logits"].shape[1] + 1
    method = recorded_network(lambda: PooledCAMNetwork(classes, RESNET), case, "psa_cam")
    maps = method.backbone(case.input("image").double())
    logits = method.class_logits(maps[-1])
    for features, name in zip(maps[1:], ("conv4", "conv5", "conv6"), strict=True):
        case.compare(f"feat_mean_{name}", features.mean((2, 3))[:, ::16], **CLOSE)
    case.compare("logits", logits, **CLOSE)
    loss = multilabel_loss(logits, class_labels(case))
    case.compare("loss", loss, **CLOSE)
    loss.backward()
    check_gradients(case, method, "psa_cam")
    case.compare("cam", method.class_activation(maps[-1]), **CLOSE)


@recorded("ms_psa_cam_merge")
def test_merging_of_scales_matches_the_authors(case):
    pairs, size = scale_pairs(case, rectify=True), tuple(case.meta["size"])
    outputs = iter(pairs.values())
    given = lambda views: (next(outputs),)  # noqa: E731
    (total,), _ = summed_cam(given, torch.zeros(1, 3, *size), case.meta["scales"], [size])
    cam, label = divide_by_maximum(total), case["label"][None].float()
    present = label[0] > 0
    case.compare("norm_cam", cam[0, present], atol=1e-5)
    for key in case.starting("pred_"):
        case.same(key, scored_label(cam, label, int(key.removeprefix("pred_")) / 100)[0])
    for key in case.starting("bg_alpha"):
        score = background_score(cam[0, present], float(key.removeprefix("bg_alpha")))
        case.compare(key, score[::2, ::2], atol=1e-5)


# -- the affinity network


@recorded("ms_psa_aff_label")
def test_labels_match_the_authors(case):
    volume, jitter = case.input("volume"), case.input("jitter")
    step = jitter.shape[0] // volume.shape[0]
    volume = volume.repeat_interleave(step, 0).repeat_interleave(step, 1) + jitter
    volume[:, : 1 + case.noted(r"columns 0\.\.(\d+)", 16)] = 0
    scores = F.avg_pool2d(volume.permute(2, 0, 1).unflatten(0, (2, -1)), step)
    case.compare("pooled", scores.flatten(0, 1).permute(1, 2, 0), rtol=0)
    label = merge_readings(scores)
    case.same("label", label)
    pairs = PixelPairs(radius_of(len(case["neg"])))
    for name, found in pair_label(label[None], pairs)._asdict().items():
        case.same(name, found[0])


@recorded("ms_psa_aff_loss")
def test_loss_matches_reference_values_and_gradient(case):
    affinity = case.input("aff").requires_grad_()
    losses = pair_affinity_loss(affinity, drawn_labels(case))
    for name, ours in {"bg": "bg_pos", "fg": "fg_pos", "neg": "neg"}.items():
        case.compare(name, losses[ours], atol=1e-5)
    total = weighted(losses)
    case.compare("total", total, atol=1e-5)
    case.compare("grad_sub", torch.autograd.grad(total, affinity)[0][:, ::4, ::6], atol=1e-5)


@recorded("ms_psa_aff_net")
def test_affinities_match_the_authors(case, double_precision):
    method = recorded_affinity_net(case)
    features = method.features(case.input("image").double())
    size = features.shape[-2:]
    pairs = method.pairs(size)
    affinity = pair_affinity(features, pairs)
    case.compare("aff", affinity, **CLOSE)
    loss = weighted(pair_affinity_loss(affinity, drawn_labels(case)))
    case.compare("loss", loss, **CLOSE)
    loss.backward()
    check_gradients(case, method, "psa_affinity", **CLOSE)

    dense = torch.eye(size.numel())
    source, destination = pairs.indices(tuple(size))
    dense[source.expand_as(destination), destination] = affinity[0].detach().to(dense.dtype)
    case.compare("dense_sub", torch.maximum(dense, dense.T)[::3, ::3], **CLOSE)


@recorded("ms_psa_random_walk")
def test_random_walk_matches_the_authors(case):
    method = recorded_affinity_net(case, torch.float32).eval()
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
    for key in case.starting("rw_"):
        method.alpha, method.beta, method.exp_times = (int(part[1:]) for part in key.split("_")[1:])
        case.compare(key, method.walk(image, cam), **CLOSE)
        label = F.pad(class_ids, (1, 0))[method.propagate(image, cam).argmax(0)]
        case.same(key.replace("rw", "label"), label, differing=0.001)


# -- any input


def test_published_network_has_the_published_groups():
    sizes = GoldenCase(GOLDEN / "ms_psa_cls_net.npz").meta["group_sizes_after_train"]
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
