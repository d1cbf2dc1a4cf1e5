"""Configs merge their bases, and refuse what nobody reads."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from engine.config import load as config
from engine.config.load import (
    CONFIGS,
    ROOT,
    documented_keys,
    find_config,
    load_config,
    load_stages,
    to_plain,
)
from engine.method import build_method
from engine.segmentation import inference_refiner
from utils.build import build
from utils.files import differences
from utils.schedule import Schedule

EXPERIMENTS = sorted(
    str(p.relative_to(ROOT))
    for p in [*CONFIGS.rglob("*.yaml"), *(ROOT / "bench/configs").rglob("*.yaml")]
    if p.parent.name not in ("configs", "datasets", "stages")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves_and_builds_its_targets(name):
    cfg = load_config(name)
    assert OmegaConf.missing_keys(cfg) == set()
    # The command line checks the keys of open mappings against their targets; every shipped file must pass it
    # too.
    plain = to_plain(cfg)
    method = [f"method.{key}=null" for key in plain["method"] if key != "target"]
    load_config(name, [*method, *(f"data.options.{key}=null" for key in plain["data"]["options"])])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_explains_every_key(name):
    assert [key for key, _, meaning in documented_keys(name) if not meaning] == []


@pytest.mark.parametrize(
    ("name", "part", "keys"),
    [
        ("toco/voc", "backbone", "name pretrained aux_layer pyramid freeze_pos_embed frozen"),
        ("toco/voc", "head", "hidden_dim bottleneck_dim out_dim"),
        ("toco/voc", "refiner", "dilations iterations softness position_weight"),
        ("toco/voc", "decoder_options", "hidden dilation"),
        ("seco/voc", "decoder_options", "dilations"),
        ("seco/voc", "head", "hidden_dim"),  # the other widths are the encoder's
        ("cam/demo", "decoder_options", ""),  # a network without a decoder
        ("one_stage/voc", "backbone", "name pretrained pyramid frozen train_affine dropout width"),
        ("one_stage/voc", "refiner", "name dilations iterations softness"),
        ("segmentor/voc", "head_options", "hidden skip_dim dilations"),
    ],
)  # fmt: skip
def test_help_lists_the_arguments_of_the_parts(name, part, keys):
    """They are those of the class that the config chooses."""
    prefix = f"method.{part}."
    listed = {key for key, _, _ in documented_keys(f"configs/{name}.yaml") if key.startswith(prefix)}
    assert listed == {prefix + key for key in keys.split()}


def test_help_has_default_and_meaning_of_a_part_from_its_class():
    rows = {key: row for key, *row in documented_keys("configs/toco/voc.yaml")}
    value, meaning = rows["method.backbone.freeze_pos_embed"]
    assert value is True and meaning.startswith("no gradient for the position embedding")
    # A base class's text where the class itself has none.
    assert rows["method.refiner.iterations"] == [10, "filter passes."]


SINGLE = (
    "toco/voc mcc/voc seco/demo cam/demo one_stage/demo one_stage/baseline_voc ws_fcn/voc irn/cam_net "
    "irn/affinity psa/cam_net psa/affinity seam/cam_net segmentor/voc segmentor/demo"
)


@pytest.mark.parametrize("name", SINGLE.split())
def test_the_method_takes_every_key_of_the_help(name):
    cfg = OmegaConf.create()
    for key, value, _ in documented_keys(f"configs/{name}.yaml"):
        OmegaConf.update(cfg, key, value, force_add=True)
    with torch.device("meta"):
        build_method(cfg, 21, pretrained=False)


def test_dotted_keys_of_a_file_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cam/demo.yaml\ntrain.steps: 4\n")
    with pytest.raises(ValueError, match=r"mine.yaml: 'train.steps' is .*nested: train: {steps: ...}"):
        load_config(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("base: cam/demo.yaml\nmethod: {backbone.width: 4}\n")
    with pytest.raises(ValueError, match=r"'backbone.width'"):
        load_config(tmp_path / "mine.yaml")


def test_bases_lie_beside_their_file_too(tmp_path):
    (tmp_path / "own_base.yaml").write_text("base: cam/demo.yaml\ntrain: {steps: 4}\n")
    (tmp_path / "mine.yaml").write_text("base: own_base.yaml\n")
    assert load_config(tmp_path / "mine.yaml").train.steps == 4


def test_unknown_key_is_refused_with_a_suggestion():
    with pytest.raises(KeyError, match=r"'train.step' is not a key: did you mean 'train.steps'"):
        load_config("configs/toco/voc.yaml", ["train.step=5"])


def test_unknown_method_argument_is_refused_with_a_suggestion():
    with pytest.raises(KeyError, match=r"method.temprature.*did you mean 'method.temperature'"):
        load_config("configs/toco/voc.yaml", ["method.temprature=5"])


def test_unknown_argument_of_the_backbone_is_refused_with_a_suggestion():
    cfg = load_config("configs/toco/voc.yaml", ["method.backbone.aux_layr=2"])
    with pytest.raises(
        KeyError, match=r"'aux_layr' is not an .* of method\.backbone: did you mean 'aux_layer'"
    ):
        build_method(cfg, 21, pretrained=False)


def test_method_argument_that_no_file_sets_can_be_overridden():
    assert load_config("configs/toco/voc.yaml", ["method.object_share=0.3"]).method.object_share == 0.3


def test_override_without_value_is_refused():
    with pytest.raises(ValueError, match="not key=value"):
        load_config("configs/toco/voc.yaml", ["train.steps"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=abc", "train.steps is a whole number from 1, not 'abc'"),
        ("train.batch_size=2.5", "train.batch_size is a whole number from 1, not 2.5"),
        ("optim.lr=-1", "optim.lr is a number from 0, not -1"),
        ("train.deterministic=1", "train.deterministic is true or false, not 1"),
        ("seed=null", "seed is a whole number from 0, not None"),
        ("data.scale_range=1", "data.scale_range is a list of 2 numbers, not 1"),
        ("optim.betas=[0.9]", "optim.betas is a list of 2 numbers, not [0.9]"),
        ("infer.scales=[]", "infer.scales is a list of numbers, not []"),
        ("infer.scales=[a]", "infer.scales is a list of numbers, not ['a']"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(override, message):
    message = re.escape(message)
    with pytest.raises(ValueError, match=message):
        load_config("configs/toco/voc.yaml", [override])
    with pytest.raises(ValueError, match=f"stage.*{message}|{message}"):
        load_stages("configs/irn/voc.yaml", [override])


def test_powers_of_ten_need_no_decimal_point(tmp_path):
    name = tmp_path / "mine.yaml"
    name.write_text("base: toco/voc.yaml\noptim: {lr: 1e-4}\n")
    assert load_config(name).optim.lr == 1e-4
    assert load_config(name, ["optim.lr=2e-4"]).optim.lr == 2e-4


def test_unknown_config_names_the_closest_one():
    with pytest.raises(FileNotFoundError, match="did you mean 'configs/toco/voc.yaml'"):
        find_config("configs/toco/vocc.yaml")


def test_later_bases_win_and_the_command_line_wins_over_files():
    assert load_config("configs/toco/coco.yaml").data.source == "datasets.coco.coco_split"
    assert load_config("configs/toco/coco.yaml", ["train.steps=7"]).train.steps == 7


def test_a_list_replaces_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("infer: {scales: [1.0, 1.5, 2.0]}\nmethod: {target: methods.toco.ToCo}\n")
    child.write_text("base: base.yaml\ninfer: {scales: [0.5]}\n")
    assert list(load_config(child).infer.scales) == [0.5]


def test_bases_in_a_circle_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match="bases of each other"):
        load_config(tmp_path / "a.yaml")


def test_unknown_key_in_a_file_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("train: {stepps: 3}\n")
    with pytest.raises(KeyError, match=r"x.yaml: 'train.stepps' is not a key: did you mean 'train.steps'"):
        load_config(file)


def test_differences_name_both_values():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


def test_help_shows_what_a_config_sets_to_null(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: datasets/voc.yaml\nmethod: {target: methods.vit_base.SingleStageViT, decoder: null}\n"
    )
    rows = {key: value for key, value, _ in documented_keys(path)}
    assert rows["method.decoder"] is None
    assert not any(key.startswith("method.decoder_options.") for key in rows)


def test_build_refuses_unknown_arguments():
    with pytest.raises(
        KeyError, match="'sepc' is not an argument of utils.schedule.Schedule: did you mean 'spec'"
    ):
        build({"target": "utils.schedule.Schedule", "sepc": 1})
    with pytest.raises(ImportError, match="no 'Shedule': did you mean 'Schedule'"):
        build({"target": "utils.schedule.Shedule"})
    with pytest.raises(ImportError, match=r"no module 'utils.shedule'"):
        build({"target": "utils.shedule.Schedule"})


def test_schedule_holds_each_value_until_the_next():
    weight = Schedule([[0, 0.0], [2001, 0.1]])
    assert [weight(step) for step in (0, 2000, 2001, 10**6)] == [0.0, 0.0, 0.1, 0.1]
    assert Schedule(0.5)(123) == 0.5


@pytest.mark.parametrize(
    "spec", [[], [[5, 1.0]], [[0, 1.0], [0, 2.0]], [[0, 1.0], [9, 2.0], [3, 1.0]], [1, 2]]
)
def test_schedule_refuses_what_has_no_order(spec):
    with pytest.raises(ValueError):
        Schedule(spec)


def test_refiner_of_the_inference_is_a_name_or_a_mapping(tmp_path):
    name = tmp_path / "mine.yaml"
    name.write_text("base: toco/voc.yaml\ninfer: {refiner: {preset: toco, steps: 5}}\n")
    overrides = ["infer.refiner={name: dense_crf, preset: toco, steps: 5}"]
    for cfg in (load_config(name), load_config("configs/toco/voc.yaml", overrides)):
        refiner, protocol = inference_refiner(to_plain(cfg)["infer"]["refiner"])
        assert refiner.steps == 5 and protocol == "crf(toco,steps=5)"
    assert inference_refiner("par")[1] == "par"
    for wrong in ("tocoo", {"target": "x"}, {"name": "dense_crf", "step": 3}):
        with pytest.raises((KeyError, ValueError), match="refiner"):
            inference_refiner(wrong)
