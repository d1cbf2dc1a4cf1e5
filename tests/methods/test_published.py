"""The authors' checkpoints: recognised, converted, and computing what their programs compute."""

import json

import pytest
import torch
from torch.testing import assert_close

from methods.published import recognise
from methods.toco import ToCo
from methods.vit_base import SingleStageViT
from models.heads import ProjectionHead
from tests.conftest import GOLDEN
from tests.formula import stats
from tests.methods.authors import author_name, author_state
from utils.build import build

NET = dict(rtol=1e-4, atol=1e-4)


def pytest_generate_tests(metafunc):
    """One test per recorded network in the folder of the recorded cases."""
    if "network" in metafunc.fixturenames:
        files = (metafunc.config.getoption("--golden-dir") or GOLDEN).glob("vit_net_*.npz")
        metafunc.parametrize("network", sorted(f.stem.removesuffix("_holdout")[8:] for f in files))


def strided(case, entry, value):
    c, h, w = case[f"{entry}_stride"].tolist()
    return value[:, ::c, ::h, ::w]


def test_network_matches_reference_values(golden, network):
    case = golden(f"vit_net_{network}")
    system, _, backbone = network.removesuffix("_coco").partition("_")
    seco, tags = system == "seco", case.tags()
    num_classes = case[f"{tags[0]}/cls"].shape[1] + 1
    spec = {
        "num_classes": num_classes,
        "backbone": {"name": backbone, "aux_layer": 9 if network.endswith("coco") else -3},
    }
    torch.manual_seed(0)
    method = SingleStageViT(decoder="aspp", **spec) if seco else ToCo(**spec)
    method.eval()
    state = author_state(method, case)
    published = recognise(state)
    assert published.name == ("seco" if seco else "toco") and published.num_classes == num_classes
    report = published.load_into(method, state)
    assert not report.lines()
    for tag in tags:
        h, w = map(int, tag.split("x"))
        b = case[f"{tag}/cls"].shape[0]
        image = case.arr(f"net/x_{b}x{h}x{w}", (b, 3, h, w))
        with torch.no_grad():
            out = method.network(image)
            cam, aux_cam = method.class_activation(out.tokens)
        assert_close(out.class_logits, case[f"{tag}/cls"], **NET)
        assert_close(out.aux_class_logits, case[f"{tag}/cls_aux"], **NET)
        maps = {"seg": out.seg_logits, "feat": out.tokens.patch_tokens, "cam": cam, "cam_aux": aux_cam}
        for what, value in maps.items():
            entry = f"{tag}/{what}"
            assert_close(strided(case, entry, value), case[entry], **NET)
            assert_close(stats(value)[1:], case[f"{entry}_stats"][1:], rtol=1e-4, atol=1e-4)
        assert_close(out.tokens.cls_token, case[f"{tag}/cls_token"], **NET)
        assert_close(out.tokens.aux_tokens.flatten(2).mT[:, ::7, ::16], case[f"{tag}/aux_tokens"], **NET)
        with torch.no_grad():
            check_projections(case, tag, method, out.tokens.cls_token)
            if f"{tag}/masked_cls_token" in case:
                mask = case.arr(f"net/policy_{tag}", (b, h // 16 * (w // 16)), 0, 1) < 0.8
                masked = method.backbone(image, key_mask=mask)
                assert_close(masked.cls_token, case[f"{tag}/masked_cls_token"], **NET)
                assert_close(
                    masked.patch_tokens.flatten(2).mT[:, ::7, ::16], case[f"{tag}/masked_tokens"], **NET
                )


def check_projections(case, tag, method, cls_token):
    if isinstance(method, ToCo):
        student, teacher = method.proj_head, method.teacher_head
    else:
        widths = {"bottleneck_dim": case[f"{tag}/proj"].shape[1], "out_dim": None}
        student, teacher = (ProjectionHead(cls_token.shape[1], **widths) for _ in range(2))
        case.load_weights(student, "proj_head.")
        case.load_weights(teacher, "proj_head_t.")
    assert_close(student(cls_token), case[f"{tag}/proj"], **NET)
    assert_close(teacher(cls_token)[:, ::4], case[f"{tag}/proj_t"], **NET)


def listed_state(system, prefix=""):
    shapes = json.loads((GOLDEN / f"state_dict_{system}.json").read_text())
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("system", ["toco", "mcc", "seco"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_key_list_is_accounted_for_completely(system, prefix):
    state = listed_state(system, prefix)
    published = recognise({"state_dict": state})
    with torch.device("meta"):
        method = build(published.config["method"], num_classes=published.num_classes)
        report = published.load_into(method, state)
    assert published.num_classes == 21
    assert not report.missing and not report.unmatched
    left = set(report.training_only) | set(report.unused)
    assert left | {author_name(key) for key in method.state_dict()} == {k.removeprefix(prefix) for k in state}
    groups = {key.split(".")[0] for key in report.training_only}
    seco_only = {"encoder_k", "prototypes", "queue", "queue_label_flag", "queue_ptr"}
    assert groups == {"proj_head", "proj_head_t"} | (seco_only if system == "seco" else set())
    assert all(".head." in key for key in report.unused)
    assert "training only, not needed for inference: proj_head.mlp.0.weight" in report.lines()


@pytest.mark.parametrize("system", ["toco", "mcc"])
def test_training_can_go_on_from_a_published_checkpoint(system):
    state = listed_state(system)
    published = recognise(state)
    with torch.device("meta"):
        spec = published.config["method"] | {"target": "methods.toco.ToCo"}
        report = published.load_into(build(spec, num_classes=21), state)
    assert not report.missing and not report.training_only and not report.unmatched


def test_inference_protocol_follows_data_and_system():
    toco, seco = (recognise(listed_state(system)).config["infer"] for system in ("toco", "seco"))
    assert (toco["size"], toco["merge_flips"], toco["merge_scales"]) == ("native", "sum", "max")
    assert (seco["size"], seco["merge_flips"], seco["merge_scales"]) == (448, "sum", "max")
    state = listed_state("toco")
    for key in ("classifier.weight", "aux_classifier.weight"):
        state[key] = torch.empty(80, 768, 1, 1, device="meta")
    coco = recognise(state).config
    assert (coco["infer"]["size"], coco["infer"]["merge_flips"], coco["infer"]["merge_scales"]) == (
        448,
        "max",
        "sum",
    )
    assert coco["method"]["high_threshold"] == 0.65


def test_foreign_and_incomplete_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"fc\.weight"):
        recognise({"fc.weight": torch.zeros(1)})
    state = listed_state("toco") | {"extra.weight": torch.empty(3, device="meta")}
    del state["encoder.blocks.3.norm1.weight"]
    published = recognise(state)
    with torch.device("meta"):
        method = build(published.config["method"], num_classes=21)
        with pytest.raises(ValueError, match=r"lacks 1 weights, first backbone\.blocks\.3\.norm1\.weight"):
            published.load_into(method, state)
        state["encoder.blocks.3.norm1.weight"] = torch.empty(768, device="meta")
        assert published.load_into(method, state).unmatched == ("extra.weight",)
        state["decoder.conv8.weight"] = torch.empty(20, 512, 1, 1, device="meta")
        with pytest.raises(
            ValueError, match=r"decoder\.conv8\.weight is \(20, 512, 1, 1\) instead of \(21, "
        ):
            published.load_into(method, state)
