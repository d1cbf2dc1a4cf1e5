"""IRN: the pooled classifier with its CAMs, and the boundary and displacement network."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from engine.optim import build_optimizer
from losses.affinity import pair_label
from methods.cam import PooledCAMNetwork
from methods.irnet import IRNet
from ops.labels import merge_confident_labels
from tests.methods.recorded import check_gradients, class_labels, recorded_network, remembering
from tests.recorded import recorded

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FROZEN = {"name": "resnet50", "frozen": "all"}
CLASSIFIER = {"name": "resnet50", "frozen": ["conv1", "bn1", "layer1", "layer2"], "train_affine": True}
# Backbones with few and many maps, small enough to train here.
VIT = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 64, "pyramid": True}


def recorded_classifier(case, num_classes):
    return recorded_network(lambda: PooledCAMNetwork(num_classes, CLASSIFIER), case, "irn_cam")


# -- the classifier


@recorded("ms_irn_cam_net")
def test_classifier_matches_reference_values_and_gradients(case):
    image, cam_image = case.input("image").double(), case.input("cam_image").double()
    class_label = class_labels(case)
    method = recorded_classifier(case, class_label.shape[1] + 1)
    method.features = remembering(method.features)
    loss = method({"image": image, "class_label": class_label}, 0)[0]["cls"]
    case.compare("loss", loss, **CLOSE)
    case.compare("logits", method.class_logits(method.features(image)), **CLOSE)
    loss.backward()
    check_gradients(case, method, "irn_cam")
    frozen = case.meta["params_without_grad_prefixes"]
    frozen = tuple(name.replace("resnet50.", "backbone.") for name in frozen)
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name

    features = method.features(torch.stack([cam_image, cam_image.flip(-1)]))
    upright, mirrored = method.class_activation(features)
    case.compare("cam", upright + mirrored.flip(-1), **CLOSE)


@recorded("ms_cda_step")
def test_step_on_originals_and_pasted_images_matches_reference_values(case):
    image = torch.cat([case.input("image"), case.input("aug_image")]).double()
    class_label = class_labels(case)
    pasted = class_label.clone()
    pasted[torch.arange(len(pasted)), torch.tensor(case.meta["added"])] = 1
    class_label = torch.cat([class_label, pasted])
    method = recorded_classifier(case, class_label.shape[1] + 1)
    method.features = remembering(method.features)
    case.compare("logits", method.class_logits(method.features(image)), **CLOSE)
    # "poly sgd lr .1/1.0, wd 1e-4, max_step 100, one step"; the first step has the whole rate.
    lr, decay = case.noted(r"lr (\d*\.?\d+)", 0.1), case.noted(r"wd ([\d.e-]+\d)", 1e-4)
    groups = method.parameter_groups()
    optimizer = build_optimizer(groups, name="sgd", lr=lr, weight_decay=decay, momentum=decay)
    loss = method({"image": image, "class_label": class_label}, 0)[0]["cls"]
    loss.backward()
    optimizer.step()
    case.compare("loss", loss, **CLOSE)
    check_gradients(case, method, "irn_cam")
    for key in case.starting("after_step_"):
        name = key.removeprefix("after_step_")
        layer = name if name == "classifier" else f"backbone.{name}"
        case.compare(key, method.get_parameter(f"{layer}.weight").flatten()[: len(case[key])], **CLOSE)


def stored_outputs(case, scales):
    """An activation function that gives the recorded maps of one scale after another."""
    outputs = iter(case.input(f"out{i}").relu() for i in range(len(scales)))

    def activation(features):
        # The recorded map is the sum of image and mirrored image; a mirrored half of zeros adds nothing.
        out = next(outputs)
        return torch.stack([out, torch.zeros_like(out)])

    return activation


@recorded("ms_irn_cam_merge")
def test_cams_are_merged_as_in_the_reference(case):
    scales, (height, width) = case.meta["scales"], case.meta["size"]
    method = PooledCAMNetwork(len(case["label"]) + 1, VIT, cam_size="stride16")
    method.class_activation = stored_outputs(case, scales)
    stored = method.predict(torch.zeros(1, 3, height, width), scales)
    keys = case["label"].nonzero()[:, 0]
    case.same("keys", keys)
    maps = stored.cam[0, keys]
    case.compare("cam", stored.strided_cam[0, keys], atol=1e-5)
    case.compare("high_res", maps, atol=1e-5)

    names = F.pad(keys + 1, (1, 0))

    def argmax(percent):
        return torch.cat([torch.full_like(maps[:1], int(percent) / 100), maps]).argmax(0)

    for key in case.starting("pred_"):
        case.same(key, names[argmax(key.removeprefix("pred_"))])
    for key in case.starting("argmax_"):
        case.same(key, argmax(key.removeprefix("argmax_")))
    for key in case.starting("conf_nocrf_"):
        label = merge_confident_labels(*(argmax(percent) for percent in key.split("_")[-2:]))
        case.same(key, torch.where(label == 255, label, names[label.clamp(max=len(keys))]))


# -- boundaries and displacements


@recorded("ms_irn_net")
def test_irnet_matches_reference_values_and_gradients(case, double_precision):
    image, infer_image = case.input("image").double(), case.input("infer_image").double()
    radius = case.meta["radius"]
    method = recorded_network(lambda: IRNet(21, FROZEN, radius=radius), case, "irn")
    method.backbone.forward = remembering(method.backbone.forward)
    mean = method.mean_displacement.clone()
    edge_logits, displacement = method.network(image)
    case.compare("edge_logits", edge_logits, **CLOSE)
    case.compare("dp_train", displacement, **CLOSE)

    pairs, label_map = method.pairs, case["label_map"].long()
    label = pair_label(label_map, pairs)
    case.same("counts", [x.sum() for x in label])
    affinity = 1 - pairs.path_max(edge_logits.sigmoid()[:, 0])
    difference = pairs.source(displacement)[..., None, :] - pairs.destination(displacement)
    offset = pairs.directions.T[:, :, None]
    for name, values in {
        "pos_aff_sub": -(affinity + 1e-5).log(),
        "neg_aff_sub": -(1 + 1e-5 - affinity).log(),
        "dp_fg_sub": (difference - offset).abs(),
        "dp_bg_sub": difference.abs(),
    }.items():
        case.compare(name, values[..., ::8, ::4], **CLOSE)

    # Nearest reduction takes these labels back to the recorded ones.
    times = image.shape[-1] // label_map.shape[-1]
    mask = label_map.repeat_interleave(times, 1).repeat_interleave(times, 2)
    losses, _ = method({"image": image, "pseudo_label": mask}, 0)
    for name, loss in losses.items():
        case.compare(f"{name}_loss", loss, **CLOSE)
    total = sum(method.loss_weight(name, 0) * loss for name, loss in losses.items())
    case.compare("total", total, **CLOSE)
    total.backward()
    check_gradients(case, method, "irn")

    method.eval().mean_displacement.copy_(mean)
    with torch.no_grad():
        _, displacement = method.network(image)
    case.compare("dp_eval_sub", displacement[:, :, ::3, ::3], **CLOSE)
    edge, displacement = method.boundaries(infer_image[None])
    case.compare("infer_edge", edge[None], **CLOSE)
    case.compare("infer_dp", displacement, **CLOSE)


def test_displacements_have_no_mean_in_eval_mode():
    torch.manual_seed(0)
    method = IRNet(4, VIT, radius=4, input_size=64).train()
    batch = {"image": torch.randn(2, 3, 64, 64), "pseudo_label": torch.zeros(2, 64, 64, dtype=torch.long)}
    method(batch, 0)
    with torch.no_grad():
        _, displacement = method.eval().network(batch["image"])
    assert_close(displacement.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
