"""Whole networks of 1-stage-wseg and WS-FCN on ResNet-38d: the authors' values from image to label."""

import pytest
import torch

from engine.config.schema import Infer
from engine.optim import build_optimizer
from engine.segmentation import multi_scale_segment
from losses.segmentation import mask_loss
from methods import cnn_base
from methods.one_stage import CAMBaseline, OneStage, mean_foreground
from methods.ws_fcn import WSFCN
from models.backbones import create_backbone
from models.refiners.dense_crf import DenseCRF
from tests.methods.recorded import MADE, no_dropout
from tests.methods.single_stage import all_classes, author_names, grey_levels, local_names, normalized, table
from tests.recorded import GOLDEN, GoldenCase, recorded
from utils.image import normalize, resize

METHODS = {"wsfcn": WSFCN, "onestage": OneStage}
# The authors' names of intermediate outputs -> our modules.
PARTS = {
    "wsfcn": {"fca": "context", "align1": "alignment", "sf2": "fusion", "sg": "gate", "last_conv": "head"},
    "onestage": {"aspp": "context", "fc8_skip": "skip", "fc8_x": "deep_and_skip"}
    | {"shallow_mask": "cue_injection", "sg": "gate", "last_conv": "head"},
}


@pytest.fixture(scope="module")
def make():
    """``make(system, case, class)``: the method with the weights of a case; its backbone is built once."""
    with torch.device("meta"):  # every value comes from a case
        backbone = create_backbone("resnet38d")
    loaded, backbone = [], backbone.to_empty(device="cpu")

    def build(name, case, method_class=None):
        names = author_names(name) | {"classifier.weight": "fc8.weight"}
        if loaded != [case.weight_name("")]:  # other files may have weights of other names
            loaded[:] = [case.weight_name("")]
            case.load_author_weights(backbone, local_names(backbone, names, "backbone"), MADE)
        backbone.float()  # a test may have made it double
        num_classes = case["cls"].shape[1] + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cnn_base, "create_backbone", lambda: backbone)
            method_class = method_class or METHODS[name]
            weights = {"cls": 1.0, "mask": [[0, 0.0], [2, 1.0]]}
            method = method_class(num_classes, {}, {key: weights[key] for key in method_class.losses})
        for ours, part in method.named_children():
            if part is not backbone:
                case.load_author_weights(part, local_names(part, names, ours), MADE)
        return method.eval()

    return build


def listen(method, parts):
    """Outputs of modules by the authors' name, filled by the next forward pass."""
    heard = {}
    for theirs, ours in parts.items():
        method.get_submodule(ours).register_forward_hook(
            lambda module, inputs, output, name=theirs: heard.__setitem__(name, output)
        )
    return heard


@recorded("wsfcn_network_eval", "onestage_network_eval")
def test_network_matches_reference_values(case, make):
    system = case.name.split("_")[0]
    method, close = make(system, case), {"rtol": 1e-3, "atol": 1e-4}
    heard = listen(method, {**PARTS[system], "maps": "backbone"})
    with torch.no_grad():
        out = method.read(normalized(case.input("raw_image")))
    maps = heard.pop("maps")
    heard |= {"conv3": maps[0], "conv6": maps[-1]}
    if "sf2" in heard:
        heard["sf2_1"], heard["sf2_0"] = heard.pop("sf2")
    for name, value in heard.items():
        case.compare(name, value, **close)
    case.compare("cls", out.class_logits, **close)
    case.compare("masks", out.masks, **close)
    case.irrelevant("float32_vs_float64_maxdiff")


@recorded("wsfcn_baseline", "onestage_baseline")
def test_baseline_matches_reference_values(case, make):
    system = case.name.split("_")[0]
    method, close = make(system, case, CAMBaseline), {"rtol": 1e-3, "atol": 1e-4}
    image, labels = case.input("x"), case["labels"]
    heard = listen(method, {"logits": "classifier"})
    with torch.no_grad():
        out = method.read(image)
    case.compare("cls", out.class_logits, **close)
    case.compare("masks", out.masks, **close)
    cam = out.masks.clone()
    cam[:, 1:] *= labels[:, :, None, None]
    case.compare("cam", cam, **close)
    case.compare("cls_fg", mean_foreground(out.masks, labels), **close)
    with torch.no_grad():
        method.classifier(method.backbone(image)[-1])
    case.compare("logits", heard["logits"], **close)


@recorded("wsfcn_network_train", "onestage_network_train")
def test_training_step_matches_reference_values(case, make):
    system = case.name.split("_")[0]
    # The gradient of WS-FCN's spatial attention is so ill-conditioned that machines differ by 1 % in float32.
    dtype = torch.float64 if system == "wsfcn" else torch.float32
    method = make(system, case).train().to(dtype)
    no_dropout(method)
    method.gate.psi = case.noted(r"gate_u >= ([\d.]+)", 0.3)
    method.gate.keep_mask = lambda deep: case.input("gate_u") >= method.gate.psi
    image, labels = normalized(case.input("raw_image")).to(dtype), case["labels"].to(dtype)
    batch, names = {"image": image, "class_label": labels}, author_names(system)
    method.network = keep(method.network, seen := [])

    last_step = method.loss_weights["mask"].starts[-1]
    losses, _ = method(batch, last_step)
    for phase, step in (("pretrain", last_step - 1), ("main", last_step)):
        total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
        method.zero_grad()
        total.backward(retain_graph=phase == "pretrain")
        case.compare(f"loss_{phase}", total, rtol=1e-3, atol=1e-5)
        norms = dict(zip(case.meta["param_names"], case[f"grad_norms_{phase}"].tolist()))
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                norm = parameter.grad.norm().item()
                assert norm == pytest.approx(norms.pop(names[key]), rel=5e-3, abs=1e-6), key
        # What is left has no gradient in the authors' program either: parameters that it never uses.
        assert all(norm == -1 for norm in norms.values())
        ours = {theirs: key for key, theirs in names.items()}
        for entry in (key for key in case if key.startswith(f"grad_{phase}/") and key.endswith("__sub")):
            name = entry.removesuffix("__sub")
            gradient = method.get_parameter(ours[name.split("/")[1]]).grad
            atol = 1e-2 * case[entry].abs().max().item()
            case.compare(name, gradient, rtol=5e-3, atol=atol)

    logits = seen[-1].detach()
    masks = logits.softmax(1)
    case.compare("logits", logits, rtol=1e-3, atol=1e-4)
    case.compare("cls", method.class_scores(logits, masks), rtol=1e-3, atol=1e-4)
    case.compare("cls_fg", mean_foreground(masks, labels), rtol=1e-3, atol=1e-4)
    case.compare("dec", all_classes(method, image, masks, labels), rtol=1e-3, atol=1e-4)
    pseudo_label = method.pseudo_ground_truth(image, masks, labels)
    case.same("pseudo_labelmap", pseudo_label, differing=0.005)
    per_image = mask_loss(resize(logits, image.shape[-2:], align_corners=True), pseudo_label, labels)
    case.compare("loss_mask_per_image", per_image, rtol=1e-3, atol=1e-5)
    case.compare("loss_cls", losses["cls"], rtol=1e-3, atol=1e-5)
    norm = method.head[1]
    case.compare("bn_running_mean_last_conv_1", norm.running_mean, rtol=1e-3, atol=1e-4)
    case.compare("bn_running_var_last_conv_1", norm.running_var, rtol=1e-3, atol=1e-4)

    before = {key: p.detach().clone() for key, p in method.named_parameters() if p.requires_grad}
    groups = method.parameter_groups()
    lr, decay = case.noted(r"lr ([\d.e-]+\d)", 0.001), case.noted(r"wd ([\d.e-]+\d)", 5e-4)
    build_optimizer(groups, name="sgd", lr=lr, weight_decay=decay, momentum=0.9).step()
    moved = dict(zip(case.meta["param_names"], case["update_norms"].tolist()))
    changes = {}
    with torch.no_grad():
        for key, value in before.items():
            changes[key] = (method.get_parameter(key) - value).norm().item()
            method.get_parameter(key).copy_(value)  # the backbone is that of the next test
    method.zero_grad()
    for key, change in changes.items():
        assert change == pytest.approx(moved.pop(names[key]), rel=5e-3, abs=1e-7), key
    assert not any(moved.values())


def keep(function, results, calls=None):
    """The function, whose results and arguments are kept."""

    def call(*arguments):
        if calls is not None:
            calls.append(arguments)
        results.append(function(*arguments))
        return results[-1]

    return call


@pytest.mark.parametrize("system", METHODS)
def test_parameter_groups_are_those_of_the_authors(make, system):
    recorded = table(f"param_groups_{system}")
    method = make(system, GoldenCase(GOLDEN / f"{system}_network_eval.npz"))
    names = author_names(system)
    parameters = {id(p): names[key] for key, p in method.named_parameters()}
    ours = {
        (round(recorded["base_lr"] * group["lr_scale"], 9), 5e-4 * group["decay_scale"]): {
            parameters[id(p)] for p in group["params"]
        }
        for group in method.parameter_groups()
    }
    unused = {f"fca.fca{i}.bn.{kind}" for i in range(1, 5) for kind in ("weight", "bias")}
    for group in recorded["groups"]:
        found = ours.pop((round(group["lr"], 9), group["weight_decay"]), set())
        assert found == set(group["params"]) - unused
    assert not ours
    frozen = {names[key] for key, p in method.named_parameters() if not p.requires_grad}
    assert frozen == set(recorded["frozen"])

    method.train()
    norms = {key: m.training for key, m in method.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    modules = {key.rpartition(".")[0]: theirs.rpartition(".")[0] for key, theirs in names.items()}
    live = {modules[key] for key, training in norms.items() if training}
    fixed = {modules[key] for key, training in norms.items() if not training}
    method.eval()
    assert live == set(recorded["batchnorm_live"])
    assert fixed == set(recorded["batchnorm_frozen_stats"]) - {n.rpartition(".")[0] for n in unused}


@recorded("wsfcn_infer_pipeline", "onestage_infer_pipeline")
def test_inference_matches_reference_values(case, make):
    system = case.name.split("_")[0]
    method = make(system, case)
    method.class_threshold = float(case["fp_cut_score"])
    image_rgb = grey_levels(case.input("image"))[None]
    seen = []
    method.finish_scores = keep(method.finish_scores, [], seen)
    infer = Infer(
        scales=[float(x) for x in case.noted(r"scales ([\d.,]*\d)", "1,.5,1.5,2").split(",")],
        merge_flips="mean",
        merge_scales="mean",
        resample="bicubic",
        pad_to=case.noted(r"(\d+)x\1 canvas", 128),
    )
    with torch.no_grad():
        scores = multi_scale_segment(method, normalize(image_rgb), infer)
    class_logits = seen[0][1]
    case.compare("cls", class_logits[0], rtol=5e-3, atol=1e-3)
    confidence = class_logits.sigmoid().amax(1)[0]
    case.compare("class_confidence", confidence, rtol=5e-3, atol=1e-3)
    case.compare("labels", confidence > method.class_threshold, rtol=0, atol=0)
    case.compare("merged", scores[0], rtol=5e-3, atol=1e-3)
    case.same("pred", scores.argmax(1)[0], differing=0.005)
    refined = DenseCRF(method.crf_preset).refine(image_rgb / 255, method.crf_probs(scores))
    case.same("pred_crf", refined.argmax(1)[0], differing=0.005)
