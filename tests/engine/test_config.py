"""Configs merge their bases, and refuse what nobody reads."""

import pytest
from omegaconf import OmegaConf

from engine.checks import check_training
from engine.config.help import documented_keys
from engine.config.load import CONFIGS, ROOT, load_config, load_stages, override_config, to_plain
from engine.config.schema import frozen_differences
from engine.method import build_method
from engine.segmentation import inference_refiner
from utils.build import import_target, keyword_names
from utils.signature import arguments

EXPERIMENTS = sorted(
    str(p.relative_to(ROOT))
    for p in [*CONFIGS.rglob("*.yaml"), *(ROOT / "bench/configs").rglob("*.yaml")]
    if p.parent.name not in ("configs", "datasets", "stages")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_resolves_and_every_key_is_explained(name):
    rows = documented_keys(name)
    assert [key for key, value, meaning in rows if not meaning or value == "???"] == []
    # Signatures are read from the source. What a file sets must be an argument, as on the command line.
    keys = [key for key, _, _ in rows if key.startswith(("method.", "data.options."))]
    for section in ("method", "data.options"):
        target = dict((key, value) for key, value, _ in rows).get(
            {"method": "method.target"}.get(section, "data.source")
        )
        given = {key.removeprefix(f"{section}.").partition(".")[0] for key in keys if key.startswith(section)}
        assert given - {"target", section} <= set(arguments(str(target)) or given)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", ["train.steps: 4", "method: {backbone.width: 4}"])
def test_dotted_keys_of_a_file_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"mine.yaml .*nested"):
        load_config(write(tmp_path / "mine.yaml", f"base: cam/demo.yaml\n{text}\n"))


def test_a_key_that_a_file_has_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("train:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(ValueError, match="twice"):
        load_config(tmp_path / "twice.yaml")


def test_a_file_changes_its_bases_and_the_command_line_changes_both(tmp_path):
    """Bases are beside their file too; lists are replaced; 1e-4 is a number."""
    write(tmp_path / "own_base.yaml", "base: cam/demo.yaml\ntrain: {steps: 4}\ninfer: {scales: [1.0, 2.0]}\n")
    mine = write(tmp_path / "mine.yaml", "base: own_base.yaml\ninfer: {scales: [0.5]}\noptim: {lr: 1e-4}\n")
    cfg = load_config(mine)
    assert (cfg.train.steps, list(cfg.infer.scales), cfg.optim.lr) == (4, [0.5], 1e-4)
    assert load_config(mine, ["train.steps=7", "optim.lr=2e-4"]).optim.lr == 2e-4
    assert load_config("configs/toco/coco.yaml").data.source == "datasets.coco.coco_split"


@pytest.mark.parametrize(
    ("override", "error", "hint"),
    [
        ("train.step=5", KeyError, "command line: 'train.step' .*did you mean 'train.steps'"),
        ("method.temprature=5", KeyError, "did you mean 'temperature'"),
        ("method.backbone.aux_layr=2", KeyError, r"method\.backbone: did you mean 'aux_layer'"),
        ("train.steps", ValueError, "not key=value"),
        ("optim.name=adam", ValueError, "expects adamw or sgd, got 'adam': did you mean 'adamw'"),
    ],
)
def test_unknown_keys_are_refused(override, error, hint):
    with pytest.raises(error, match=hint):
        build_method(load_config("configs/toco/voc.yaml", [override]), 21, pretrained=False)


def test_crops_without_room_are_refused_before_a_run():
    with pytest.raises(ValueError, match="8 crops of 96"):
        check_training(load_config("configs/toco/voc.yaml", ["data.crop_size=96"]), 21)


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=abc", "train.batch_size=2.5", "optim.lr=-1", "optim.lr=nan", "seed=null",
        "optim.betas=[0.9]", "infer.scales=[a]", "infer.merge_flips=summ", "infer.tags=nope",
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_wherever_it_comes_from(override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"the command line: {key} expects"):
        load_config("configs/toco/voc.yaml", [override])
    with pytest.raises(ValueError, match=f"the command line: {key}"):  # of a checkpoint
        override_config(load_config("configs/toco/voc.yaml"), [override])


TEXTS = ["/d/set #2", "20240101_120000", "010", "1e3", "12:30", "yes", "~"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_as_it_is_typed(text, tmp_path):
    keys = ["run_name", "data.train_set", "data.root", "data.options.masks", "data.options.class_names"]
    cfg = load_config("configs/toco/voc.yaml", [f"{key}={text}" for key in keys])
    assert all(OmegaConf.select(cfg, key) == text for key in keys)
    assert cfg.work_dir == f"logs/{text}"


def test_a_text_of_a_file_stays_as_it_is_written(tmp_path):
    stage = "stages: {cam_net: {data: {train_set: 12:30, val_set: null}}}"
    mine = write(tmp_path / "mine.yaml", f"base: irn/voc.yaml\nrun_name: 010\n{stage}\n")
    assert load_config(mine).run_name == "010"
    data = load_stages(mine)[0].options["data"]
    assert data["train_set"] == "12:30" and data["val_set"] is None
    assert load_config(write(mine, "base: cam/demo.yaml\nrun_name: forêt\n")).run_name == "forêt"
    with pytest.raises(ValueError, match="quotes"):
        load_config(write(mine, "base: cam/demo.yaml\nrun_name: 1.10\n"))


def test_what_a_resumed_run_may_change():
    old, new = (
        to_plain(load_config("configs/toco/voc.yaml", changes))
        for changes in (
            [],
            ["train.steps=7", "train.log_every=7", "infer.scales=[1]", "data.root=/d", "optim.lr=1",
             "method.backbone.pretrained=null", "method.backbone.name=vit_demo", "run_name=x"],
        )
    )  # fmt: skip
    changed = {line.partition(":")[0] for line in frozen_differences(old, new)}
    assert changed == {"train.steps", "optim.lr", "method.backbone.name"}


@pytest.mark.parametrize(
    "target", ["methods.seco.SeCo", "methods.irnet.IRNet", "datasets.custom.custom_split"]
)
def test_arguments_read_from_the_source_are_those_that_python_knows(target):
    assert set(arguments(target)) == keyword_names(import_target(target))


def test_refiner_of_the_inference_is_a_name_or_a_mapping(tmp_path):
    name = tmp_path / "mine.yaml"
    name.write_text("base: toco/voc.yaml\ninfer: {refiner: {preset: toco, steps: 5}}\n")
    overrides = ["infer.refiner={name: dense_crf, preset: toco, steps: 5}"]
    for cfg in (load_config(name), load_config("configs/toco/voc.yaml", overrides)):
        refiner, protocol = inference_refiner(to_plain(cfg)["infer"]["refiner"])
        assert refiner.steps == 5 and protocol == "crf(toco,steps=5)"
    assert inference_refiner("par")[1] == "par"
    cfg = load_config("configs/toco/voc.yaml", ["eval.scores=[miou,boundary_f]", "infer.refiner=par"])
    assert (cfg.eval.scores, cfg.infer.refiner) == (["miou", "boundary_f"], "par")
    for wrong in ("tocoo", {"target": "x"}, {"name": "dense_crf", "step": 3}):
        with pytest.raises((KeyError, ValueError), match="refiner"):
            inference_refiner(wrong)


def test_another_data_source_drops_the_options_of_the_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: toco/voc.yaml\ndata: {source: tests.stages.call, root: x}\n")
    assert not load_config(tmp_path / "mine.yaml").data.options
