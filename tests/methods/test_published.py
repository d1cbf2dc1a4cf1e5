"""The authors' checkpoints: recognised, converted, and computing what their programs compute."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from engine.checkpoint import Checkpoint, restore_state
from engine.config.load import load_config, to_plain
from methods.published import PROGRAMS, recognise
from methods.toco import ToCo
from methods.vit_base import SingleStageViT
from models.heads import ProjectionHead
from tests.formula import stats
from tests.methods.authors import author_name, author_state, masked_tokens
from tests.recorded import GOLDEN, recorded
from utils.build import build

NET = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def made():
    """Weights that the networks of this file have in common."""
    return {}


@recorded("vit_net_*")
def test_network_matches_reference_values(case, made):
    system, _, backbone = case.name.removeprefix("vit_net_").removesuffix("_coco").partition("_")
    seco, tags = system == "seco", case.tags()
    num_classes = case[f"{tags[0]}/cls"].shape[1] + 1
    aux_layer = case.setting("aux_layer", 9 if case.name.endswith("coco") else -3)
    spec = {
        "num_classes": num_classes,
        "backbone": {"name": case.setting("backbone", backbone), "aux_layer": aux_layer},
    }
    with torch.device("meta"):  # every value comes from the checkpoint
        method = SingleStageViT(decoder="aspp", **spec) if seco else ToCo(**spec)
    method.to_empty(device="cpu").eval()
    state = author_state(method, case, made)
    published = recognise(state)
    assert published.name == ("seco" if seco else "toco") and published.num_classes == num_classes
    report = published.load_into(method, state)
    assert not report.lines()
    patch, heads = method.backbone.patch_size, projection_heads(case, method, made)
    for tag in tags:
        h, w = map(int, tag.split("x"))
        b = case[f"{tag}/cls"].shape[0]
        image = case.arr(f"net/x_{b}x{h}x{w}", (b, 3, h, w))
        with torch.no_grad():
            out = method.network(image)
            cam, aux_cam = method.class_activation(out.tokens)
            for entry, head, every in zip(("proj", "proj_t"), heads, (1, 4)):
                case.compare(f"{tag}/{entry}", head(out.tokens.cls_token)[:, ::every], **NET)
        case.compare(f"{tag}/cls", out.class_logits, **NET)
        case.compare(f"{tag}/cls_aux", out.aux_class_logits, **NET)
        maps = {"seg": out.seg_logits, "feat": out.tokens.patch_tokens, "cam": cam, "cam_aux": aux_cam}
        for what, value in maps.items():
            entry = f"{tag}/{what}"
            sc, sh, sw = case[f"{entry}_stride"].tolist()
            case.compare(entry, value[:, ::sc, ::sh, ::sw], **NET)
            check_stats(case, entry, value)
        case.compare(f"{tag}/cls_token", out.tokens.cls_token, **NET)
        aux_tokens = out.tokens.aux_tokens.flatten(2).mT
        case.compare(f"{tag}/aux_tokens", aux_tokens[:, ::7, ::16], **NET)
        check_stats(case, f"{tag}/aux_tokens", aux_tokens)
        if f"{tag}/masked_cls_token" in case:
            mask = case.arr(f"net/policy_{tag}", (b, h // patch * (w // patch)), 0, 1) < 0.8
            with torch.no_grad():
                cls_token, tokens = masked_tokens(method.backbone, image, mask)
            case.compare(f"{tag}/masked_cls_token", cls_token, **NET)
            case.compare(f"{tag}/masked_tokens", tokens[:, ::7, ::16], **NET)
            case.irrelevant(f"{tag}/masked_aux_tokens_stats")  # no method reads them


def check_stats(case, entry, value):
    """Statistics but the mean, which is close to 0."""
    if f"{entry}_stats" in case:
        assert_close(stats(value)[1:], case[f"{entry}_stats"][1:], rtol=1e-4, atol=1e-4)


def projection_heads(case, method, made):
    """Student's and teacher's; the network of SeCo that is tested has none."""
    if isinstance(method, ToCo):
        return method.proj_head, method.teacher_head
    widths = {"bottleneck_dim": case[f"{case.tags()[0]}/proj"].shape[1], "out_dim": None}
    with torch.device("meta"):
        width = method.backbone.embed_dim
        heads = nn.ModuleDict({n: ProjectionHead(width, **widths) for n in ("proj_head", "teacher_head")})
    state = author_state(heads, case, made)
    heads.load_state_dict(dict(zip(heads.state_dict(), state.values())), assign=True)
    return heads.values()


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
    left = set(report.extra)
    assert left | {author_name(key) for key in method.state_dict()} == {k.removeprefix(prefix) for k in state}
    groups = {key.split(".")[0] for key in report.extra if ".head." not in key}
    seco_only = {"encoder_k", "prototypes", "queue", "queue_label_flag", "queue_ptr"}
    assert groups == {"proj_head", "proj_head_t"} | (seco_only if system == "seco" else set())
    assert "not needed for inference: proj_head.mlp.0.weight" in report.lines()


@pytest.mark.parametrize("system", ["toco", "mcc", "seco"])
def test_training_can_go_on_from_a_published_checkpoint(system):
    state = listed_state(system)
    published = recognise(state)
    target = "methods.seco.SeCo" if system == "seco" else "methods.toco.ToCo"
    with torch.device("meta"):
        report = published.load_into(
            build(published.config["method"] | {"target": target}, num_classes=21), state
        )
    assert not report.missing and not report.unmatched
    # In SeCo's checkpoints the heads have a layer that no value passes through.
    unused = (".head.", ".last_layer.") if system == "seco" else (".head.",)
    assert all(any(part in key for part in unused) for key in report.extra)


def test_resume_begins_with_published_weights(tmp_path):
    torch.manual_seed(0)
    theirs, ours = (ToCo(4, {"name": "deit_tiny_patch16_224"}, head={"hidden_dim": 64}) for _ in range(2))
    state = {f"module.{author_name(key)}": value for key, value in theirs.state_dict().items()}
    optimizer, found = torch.optim.AdamW(ours.parameters()), Checkpoint(tmp_path / "theirs.pth", state)
    progress = restore_state(found, ours, optimizer, {}, torch.device("cpu"), "seg")
    assert progress.step == 0
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_inference_protocol_follows_data_and_system():
    toco, seco = (recognise(listed_state(system)).config["infer"] for system in ("toco", "seco"))
    assert (toco["size"], toco["merge_flips"], toco["merge_scales"]) == ("native", "sum", "max")
    assert (seco["size"], seco["merge_flips"], seco["merge_scales"]) == (448, "sum", "max")
    state = listed_state("toco")
    for key in ("classifier.weight", "aux_classifier.weight"):
        state[key] = torch.empty(80, 768, 1, 1, device="meta")
    coco = recognise(state).config
    assert [coco["infer"][key] for key in ("size", "merge_flips", "merge_scales")] == [448, "max", "sum"]
    assert coco["method"]["high_threshold"] == 0.65


def test_foreign_and_incomplete_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"fc\.weight"):
        recognise({"fc.weight": torch.zeros(1)})
    state = listed_state("toco") | {"extra.weight": torch.empty(3, device="meta")}
    del state["encoder.blocks.3.norm1.weight"]
    published = recognise(state)
    with torch.device("meta"):
        method = build(published.config["method"], num_classes=21)
        with pytest.raises(ValueError, match=r"missing, first .*blocks\.3\.norm1"):
            published.load_into(method, state)
        state["encoder.blocks.3.norm1.weight"] = torch.empty(768, device="meta")
        assert published.load_into(method, state).unmatched == ("extra.weight",)
        state["decoder.conv8.weight"] = torch.empty(20, 512, 1, 1, device="meta")
        with pytest.raises(ValueError, match="another shape"):
            published.load_into(method, state)


# -- programs with a CNN


def cnn_tables():
    """Every listed state dict of a CNN program: (file, entry or None, program, backbone)."""
    yield "wsfcn", None, "ws_fcn", "resnet38d"
    yield "onestage", None, "one_stage", "resnet38d"
    for system, name in (("wsfcn", "ws_fcn"), ("onestage", "one_stage")):
        for variant in json.loads((GOLDEN / f"state_dict_{system}_variants.json").read_text()):
            backbone, kind = variant.rsplit("_", 1)
            program = name if kind == "ae" else "one_stage_baseline"
            backbone = {"resnet38": "resnet38d", "vgg16": "vgg16d"}.get(backbone, backbone)
            yield f"{system}_variants", variant, program, backbone
    for table, program in (("irn_cam", "irn_cam"), ("irn_irn", "irn"), ("irn_irn_train", "irn")):
        yield table, None, program, "resnet50"
    for table, program in (("psa_cls", "psa_cam"), ("psa_aff", "psa_affinity"), ("seam_aff", "psa_affinity")):
        yield table, None, program, "resnet38d"
    yield "seam_seam", None, "seam", "resnet38d"


def cnn_state(table, variant=None, prefix=""):
    """The listed keys, aliases among them, with values that take no memory; see ``build_recognised``."""
    listed = json.loads((GOLDEN / f"state_dict_{table}.json").read_text())
    if "canonical" in listed:
        shapes = listed["canonical"]
        shapes |= {alias: shapes[key] for alias, key in listed["aliases"].items()}
    else:
        shapes = {key: shape for key, shape, _ in (listed[variant] if variant else listed["entries"])}
    value = torch.zeros((), device="cpu" if table.startswith("irn_irn") else "meta")
    return {prefix + key: value.expand(shape) for key, shape in shapes.items()}


def build_recognised(published):
    """The method of a recognised checkpoint; without memory where its constructor computes nothing."""
    with torch.device("cpu" if published.name == "irn" else "meta"):
        return build(published.config["method"], num_classes=published.num_classes)


@pytest.mark.parametrize("table, variant, program, backbone", cnn_tables())
def test_every_listed_checkpoint_of_a_cnn_loads_completely(table, variant, program, backbone):
    state = cnn_state(table, variant)
    published = recognise(state)
    assert (published.name, published.num_classes) == (program, 21)
    assert published.config["method"]["backbone"]["name"] == backbone
    method = build_recognised(published)
    report = published.load_into(method, state)
    assert not report.lines() and not report.missing
    # Whatever has no alias or constant in the list has its own place in our network.
    placed = published.rename({key: key for key in state if key not in report.repeats})
    assert set(placed) == set(method.state_dict()) and len(placed) + len(report.repeats) == len(state)
    # What is left out repeats an entry, is a constant, or is never called by the authors' program.
    if table.startswith("irn"):
        aliases = json.loads((GOLDEN / f"state_dict_{table}.json").read_text())["aliases"]
        constants = {key for key in report.repeats if key.startswith(("path_indices", "disp_target"))}
        assert set(report.repeats) - constants == set(aliases)


def test_no_program_is_without_a_listed_checkpoint():
    assert {program for *_, program, _ in cnn_tables()} == set(PROGRAMS)


def test_values_land_where_their_names_say():
    """In a narrow network, with the wrappers of distributed training, without counters, as in old files."""
    keys = [key for key in cnn_state("psa_cls") if "num_batches_tracked" not in key]
    published = recognise(cnn_state("psa_cls"))
    spec = published.config["method"] | {"backbone": {"name": "resnet38d", "width": 4}}
    method = build(spec, num_classes=21)
    own, names = method.state_dict(), published.rename({key: key for key in keys})
    state = {f"module.{key}": torch.rand(own[name].shape) for name, key in names.items()}
    report = published.load_into(method, {"state_dict": state})
    assert not report.missing
    for name, value in (("classifier", "fc8"), ("backbone.b5_2.conv_branch2a", "b5_2.conv_branch2a")):
        assert torch.equal(method.get_parameter(f"{name}.weight"), state[f"module.{value}.weight"])
    assert torch.equal(method.backbone.bn7.running_var, state["module.bn7.running_var"])


@pytest.mark.parametrize(
    "table, key, rows, num_classes",
    [
        ("wsfcn", "last_conv.8", 80, 81),
        ("onestage", "last_conv.8", 3, 4),
        ("psa_cls", "fc8", 80, 81),
        ("seam_seam", "fc8", 81, 81),
    ],
)
def test_number_of_classes_follows_the_weights(table, key, rows, num_classes):
    state = cnn_state(table)
    for name in [name for name in state if name.startswith(f"{key}.")]:
        state[name] = torch.empty(rows, *state[name].shape[1:], device="meta")
    published = recognise(state)
    assert published.num_classes == num_classes
    published.load_into(build_recognised(published), state)


def test_protocols_of_the_cnns_follow_program_and_backbone():
    published = recognise(cnn_state("wsfcn_variants", "vgg16_ae")).config
    assert published["method"]["backbone"]["conv4_stride"] == 2
    assert published["infer"]["scales"] == [1.0, 0.5, 1.5, 2.0] and published["infer"]["pad_to"] == 1024
    published = recognise(cnn_state("onestage_variants", "vgg16_ae")).config
    assert "conv4_stride" not in published["method"]["backbone"]
    assert published["method"]["background"] == ["power", 1.0]
    assert published["infer"]["scales"] == [1.0, 0.75, 1.25, 1.5] and published["infer"]["pad_to"] == 768
    assert not published["infer"].get("tags")  # the authors' file has them on, which is no fair test
    assert recognise(cnn_state("irn_cam")).config["method"]["cam_size"] == "stride16"


@pytest.mark.parametrize(
    "table, classes, config",
    [
        ("wsfcn", 21, "ws_fcn/voc.yaml"),
        ("wsfcn", 81, "ws_fcn/coco.yaml"),
        ("onestage", 21, "one_stage/voc.yaml"),
        ("onestage_variants/resnet50_ae", 21, "one_stage/voc_resnet50.yaml"),
        ("onestage_variants/resnet101_ae", 21, "one_stage/voc_resnet101.yaml"),
        ("onestage_variants/vgg16_ae", 21, "one_stage/voc_vgg16.yaml"),
    ],
)
def test_protocol_is_that_of_the_config_we_train_with(table, classes, config):
    state = cnn_state(*table.split("/"))
    state["last_conv.8.weight"] = torch.empty(classes - 1, 256, 1, 1, device="meta")
    recognised, ours = recognise(state).config, load_config(config)
    assert recognised["method"]["target"] == ours.method.target
    assert {key: ours.infer[key] for key in recognised["infer"]} == recognised["infer"]
    # The arguments that a recognised checkpoint leaves to their defaults are those of the config.
    with torch.device("meta"):
        theirs = build(recognised["method"], num_classes=classes)
        trained = build(
            to_plain(ours.method) | {"backbone": recognised["method"]["backbone"]}, num_classes=classes
        )
    assert settings_of(theirs) == settings_of(trained)


def settings_of(method):
    """Whatever arguments decide in a method and its parts, but for weights of losses and learning rates."""
    parts = {part: vars(module) for part, module in method.named_modules()}
    parts["refiner"] = vars(method.refiner)
    return {
        (part, name): value
        for part, settings in parts.items()
        for name, value in settings.items()
        if not name.startswith("_") and name not in ("training", "loss_weights", "lr_scales", "refiner")
    }
