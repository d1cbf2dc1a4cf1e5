"""IRN: the pooled classifier with its CAMs, and the boundary and displacement network."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from engine.optim import build_optimizer, poly_warmup_factor, set_learning_rate
from losses.affinity import pair_label
from methods.cam import PooledCAMNetwork
from methods.irnet import IRNet
from methods.published import PROGRAMS
from ops.labels import merge_confident_labels
from tests.conftest import GOLDEN
from tests.methods.recorded import assert_recorded_gradients, recorded_network
from utils import distributed
from utils.weights import rename_keys

CAM_KEYS, IRN_KEYS = (PROGRAMS[name]["rules"].items() for name in ("irn_cam", "irn"))
FROZEN = {"name": "resnet50", "frozen": "all"}
CLASSIFIER = {"name": "resnet50", "frozen": ["conv1", "bn1", "layer1", "layer2"], "train_affine": True}
# Backbones with few and many maps, small enough to train here.
VIT = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 64, "pyramid": True}


def recorded_classifier(case, num_classes):
    build = lambda: PooledCAMNetwork(num_classes, CLASSIFIER)  # noqa: E731
    return recorded_network(build, case, CAM_KEYS, authors("cam"))


def recorded_irnet(case, radius):
    build = lambda: IRNet(21, FROZEN, radius=radius)  # noqa: E731
    return recorded_network(build, case, IRN_KEYS, authors("irn"))


def authors(program):
    """The names of the authors' weights; entries that are held twice count once."""
    return list(json.loads((GOLDEN / f"state_dict_irn_{program}.json").read_text())["canonical"])


def class_labels(case):
    threshold = float(re.search(r"label_u > ([\d.]+)", case.meta["label"])[1])
    return (case.input("label_u") > threshold).float()


# -- the classifier


def test_classifier_matches_reference_values_and_gradients(golden):
    case = golden("ms_irn_cam_net")
    image, cam_image = case.input("image"), case.input("cam_image")
    class_label = class_labels(case)
    method = recorded_classifier(case, class_label.shape[1] + 1)
    loss = method({"image": image, "class_label": class_label}, 0)[0]["cls"]
    loss.backward()
    assert_close(loss.detach(), case["loss"], rtol=1e-4, atol=1e-4)
    assert_close(method.class_logits(image).detach(), case["logits"], rtol=1e-4, atol=1e-4)
    assert_recorded_gradients(method, case, CAM_KEYS)
    frozen = rename_keys(
        dict.fromkeys(case.meta["params_without_grad_prefixes"]), [(r"^resnet50\.", "backbone.")]
    )
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith(tuple(frozen)), name
    assert sum(p.grad is not None for p in method.parameters()) == case.meta["n_params_with_grad"]

    upright, mirrored = method.activation_of(torch.stack([cam_image, cam_image.flip(-1)]))
    assert_close(upright + mirrored.flip(-1), case["cam"], rtol=1e-4, atol=1e-4)


def test_step_on_originals_and_pasted_images_matches_reference_values(golden):
    case = golden("ms_cda_step")
    image = torch.cat([case.input("image"), case.input("aug_image")])
    class_label = class_labels(case)
    pasted = class_label.clone()
    pasted[torch.arange(len(pasted)), torch.tensor(case.meta["added"])] = 1
    # In double precision, because small gradients of a deep network differ between machines in float32.
    image, class_label = image.double(), torch.cat([class_label, pasted]).double()
    method = recorded_classifier(case, class_label.shape[1] + 1).double()
    assert_close(method.class_logits(image).detach().float(), case["logits"], rtol=1e-4, atol=1e-4)
    optimizer = build_optimizer(
        method.parameter_groups(), name="sgd", lr=0.1, weight_decay=1e-4, momentum=1e-4
    )
    set_learning_rate(optimizer, poly_warmup_factor(0, steps=100, warmup_steps=0, warmup_ratio=0, power=0.9))
    loss = method({"image": image, "class_label": class_label}, 0)[0]["cls"]
    loss.backward()
    optimizer.step()
    assert_close(loss.detach().float(), case["loss"], rtol=1e-4, atol=1e-4)
    assert_recorded_gradients(method, case, CAM_KEYS)
    for key in (key for key in case if key.startswith("after_step_")):
        name = key.removeprefix("after_step_")
        layer = name if name == "classifier" else f"backbone.{name}"
        found = method.get_parameter(f"{layer}.weight").detach().flatten().float()
        assert_close(found[: len(case[key])], case[key], rtol=1e-4, atol=1e-4)


def stored_outputs(case, scales):
    """An activation function that gives the recorded maps of one scale after another."""
    outputs = iter(case.input(f"out{i}").relu() for i in range(len(scales)))

    def activation(image):
        # The recorded map is the sum of image and mirrored image; a mirrored half of zeros adds nothing.
        out = next(outputs)
        return torch.stack([out, torch.zeros_like(out)])

    return activation


def test_cams_are_merged_as_in_the_reference(golden):
    case = golden("ms_irn_cam_merge")
    scales, (height, width) = case.meta["scales"], case.meta["size"]
    method = PooledCAMNetwork(len(case["label"]) + 1, VIT, cam_size="stride16")
    method.activation_of = stored_outputs(case, scales)
    stored = method.predict(torch.zeros(1, 3, height, width), scales)
    keys = case["label"].nonzero()[:, 0]
    assert torch.equal(keys, case["keys"])
    maps, strided = stored.cam[0, keys], stored.strided_cam[0, keys]
    assert_close(strided, case["cam"], rtol=1e-5, atol=1e-5)
    assert_close(maps, case["high_res"], rtol=1e-5, atol=1e-5)

    names = F.pad(keys + 1, (1, 0))

    def argmax(threshold):
        return torch.cat([torch.full_like(maps[:1], threshold), maps]).argmax(0)

    assert torch.equal(names[argmax(0.15)], case["pred_015"].long())
    for key in (key for key in case if key.startswith("argmax_")):
        found = argmax(int(key.removeprefix("argmax_")) / 100)
        assert torch.equal(found, case[key].long())
    (key,) = (key for key in case if key.startswith("conf_nocrf_"))
    strict, lax = (int(percent) / 100 for percent in key.split("_")[-2:])
    label = merge_confident_labels(argmax(strict), argmax(lax))
    label = torch.where(label == 255, label, names[label.clamp(max=len(keys))])
    assert torch.equal(label, case[key].long())


@pytest.mark.parametrize("cam_size", ["image", "stride16"])
def test_cams_of_a_mirrored_image_are_mirrored(cam_size):
    torch.manual_seed(0)
    method = PooledCAMNetwork(4, {"name": "resnet50"}, cam_size=cam_size).eval()
    image = torch.randn(1, 3, 64, 96)
    upright = method.predict(image, (1.0, 0.5)).cam
    mirrored = method.predict(image.flip(-1), (1.0, 0.5)).cam
    assert_close(mirrored.flip(-1), upright, rtol=1e-4, atol=1e-4)
    assert upright.shape == (1, 3, 64, 96) and upright.min() >= 0 and upright.max() <= 1


@pytest.mark.parametrize("label", [torch.zeros(2, 3), torch.ones(2, 3)])
def test_images_without_or_with_all_tags_give_a_finite_loss(label):
    method = PooledCAMNetwork(4, VIT, dropout=0.5).train()
    loss = method({"image": torch.randn(2, 3, 64, 64), "class_label": label}, 0)[0]["cls"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_pixels_average_to_the_logits():
    """Pooling and classifier are linear, so the unrectified CAM averages to the logit."""
    torch.manual_seed(0)
    method = PooledCAMNetwork(4, VIT, dropout=0.5).eval()
    image = torch.randn(2, 3, 64, 64)
    maps = method.classifier(method.backbone(image)[-1])
    assert_close(method.predict(image, ()).class_logits, maps.mean((2, 3)))


# -- boundaries and displacements


def test_irnet_matches_reference_values_and_gradients(golden):
    case = golden("ms_irn_net")
    image, infer_image = case.input("image"), case.input("infer_image")
    method = recorded_irnet(case, case.meta["radius"])
    mean = method.mean_displacement.clone()
    edge_logits, displacement = method.network(image)
    assert_close(edge_logits.detach(), case["edge_logits"], rtol=1e-4, atol=1e-4)
    assert_close(displacement.detach(), case["dp_train"], rtol=1e-4, atol=1e-4)

    pairs, label_map = method.pairs, case["label_map"].long()
    label = pair_label(label_map, pairs)
    assert [x.sum().item() for x in label] == case["counts"].tolist()
    affinity = (1 - pairs.path_max(edge_logits.sigmoid()[:, 0])).detach()
    difference = (pairs.source(displacement)[..., None, :] - pairs.destination(displacement)).detach()
    offset = pairs.directions.T[:, :, None]
    for name, values in {
        "pos_aff_sub": -(affinity + 1e-5).log()[:, ::8, ::4],
        "neg_aff_sub": -(1 + 1e-5 - affinity).log()[:, ::8, ::4],
        "dp_fg_sub": (difference - offset).abs()[:, :, ::8, ::4],
        "dp_bg_sub": difference.abs()[:, :, ::8, ::4],
    }.items():
        assert_close(values, case[name], rtol=1e-4, atol=1e-4)

    # Nearest reduction takes these labels back to the recorded ones.
    mask = label_map.repeat_interleave(4, 1).repeat_interleave(4, 2)
    losses, _ = method({"image": image, "pseudo_label": mask}, 0)
    for name, loss in losses.items():
        assert_close(loss.detach(), case[f"{name}_loss"], rtol=1e-4, atol=1e-4)
    total = sum(method.loss_weight(name, 0) * loss for name, loss in losses.items())
    assert_close(total.detach(), case["total"], rtol=1e-4, atol=1e-4)
    total.backward()
    assert_recorded_gradients(method, case, IRN_KEYS)
    assert sum(p.grad is not None for p in method.parameters()) == case.meta["n_params_with_grad"]

    method.eval().mean_displacement.copy_(mean)
    with torch.no_grad():
        _, displacement = method.network(image)
    assert_close(displacement[:, :, ::3, ::3], case["dp_eval_sub"], rtol=1e-4, atol=1e-4)
    edge, displacement = method.boundaries(infer_image[None])
    assert_close(edge[None], case["infer_edge"], rtol=1e-4, atol=1e-4)
    assert_close(displacement, case["infer_dp"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", [VIT, {"name": "resnet50"}])
def test_boundaries_are_learned_from_labels(backbone):
    """Any backbone with maps will do; the loss falls on one image with two regions."""
    torch.manual_seed(0)
    method = IRNet(4, backbone, radius=4, input_size=64).train()
    image = torch.randn(1, 3, 64, 64)
    mask = torch.zeros(1, 64, 64, dtype=torch.long)
    mask[:, :, 30:], image[..., 30:] = 2, image[..., 30:] + 2
    mask[:, :8] = 255
    backbone_before = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([g | {"lr": 0.02 * g["lr_scale"]} for g in method.parameter_groups()])
    totals = []
    for step in range(12):
        losses, _ = method({"image": image, "pseudo_label": mask}, step)
        total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    trained = [p for group in method.parameter_groups() for p in group["params"]]
    assert all(p.grad is not None for p in trained) and len(trained) == len({id(p) for p in trained})
    assert all(torch.equal(v, backbone_before[k]) for k, v in method.backbone.state_dict().items())


def test_displacements_have_no_mean_in_eval_mode():
    torch.manual_seed(0)
    method = IRNet(4, VIT, radius=4, input_size=64).train()
    batch = {"image": torch.randn(2, 3, 64, 64), "pseudo_label": torch.zeros(2, 64, 64, dtype=torch.long)}
    method(batch, 0)
    with torch.no_grad():
        _, displacement = method.eval().network(batch["image"])
    assert_close(displacement.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask_value", [0, 2, 255])
def test_a_mask_of_one_value_gives_finite_losses(mask_value):
    method = IRNet(4, VIT, radius=4, input_size=64).train()
    mask = torch.full((1, 64, 64), mask_value)
    losses, _ = method({"image": torch.randn(1, 3, 64, 64), "pseudo_label": mask}, 0)
    assert all(loss.isfinite() for loss in losses.values())


def test_propagation_gives_scores_at_image_size_whatever_the_size_of_the_cam():
    torch.manual_seed(0)
    method = IRNet(4, VIT, input_size=64, exp_times=2).eval()
    image = torch.randn(1, 3, 70, 51)
    for maps in (torch.rand(2, 70, 51), torch.rand(2, 18, 13)):
        scores = method.propagate(image, maps)
        assert scores.shape == (3, 70, 51) and scores.isfinite().all()
        assert (scores[0] == 0.25).all() and scores[1:].max() == 1
    assert method.propagate(image, torch.zeros(1, 70, 51)).argmax(0).max() == 0


def one_step(part):
    """Losses, a gradient and the mean displacement of a step on a part of the batch."""
    torch.manual_seed(0)
    method = IRNet(4, VIT, radius=4, input_size=64).train()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, 64, 64, generator=generator)
    mask = torch.zeros(4, 64, 64, dtype=torch.long)
    for i in range(4):  # images with different numbers of pairs of every kind
        mask[i, :, 10 * i + 8 :], mask[i, : 12 * i] = 2, 255
    losses, _ = method({"image": image[part], "pseudo_label": mask[part]}, 1)
    sum(method.loss_weight(name, 1) * loss for name, loss in losses.items()).backward()
    return (
        {name: loss.item() for name, loss in losses.items()},
        method.edge_output.weight.grad,
        method.mean_displacement,
    )


def test_parts_of_a_batch_on_two_processes_average_to_the_whole(monkeypatch):
    losses, gradient, mean = one_step(slice(None))
    halves = [slice(0, 2), slice(2, 4)]
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    # Processes take turns: first each says what it gives to every sum, then each gets the sums.
    given = [[], []]
    for part, values in zip(halves, given, strict=True):
        monkeypatch.setattr(
            distributed, "all_reduce_sum", lambda x, values=values: values.append(x.detach()) or x
        )
        one_step(part)
    parts = []
    for part in halves:
        sums = (first + second for first, second in zip(*given, strict=True))
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda x, sums=sums: next(sums))
        parts.append(one_step(part))
    for name, loss in losses.items():
        assert sum(part[0][name] for part in parts) / 2 == pytest.approx(loss, rel=1e-4), name
    assert_close((parts[0][1] + parts[1][1]) / 2, gradient, rtol=1e-3, atol=1e-6)
    for part in parts:
        assert_close(part[2], mean, rtol=1e-4, atol=1e-6)


def test_pooling_of_the_classifier():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 48, 48)
    for pooling in ("mean", "max"):
        method = PooledCAMNetwork(4, VIT, pooling=pooling).eval()
        features = method.backbone(image)[-1]
        pooled = features.mean((2, 3)) if pooling == "mean" else features.amax((2, 3))
        assert_close(method.class_logits(image), pooled @ method.classifier.weight[:, :, 0, 0].T)
    with pytest.raises(ValueError, match="pooling 'sum' is neither"):
        PooledCAMNetwork(4, VIT, pooling="sum")
