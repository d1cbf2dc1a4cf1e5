"""Pipelines: stages run in order, what is unchanged is not done again, what was interrupted goes on."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from datasets.lists import read_class_names, read_list
from datasets.tags import read_tags, write_tags
from engine.config.load import (
    CONFIGS,
    STAGE_KEYS,
    describe,
    load_config,
    load_stages,
    override_config,
    to_plain,
)
from engine.method import build_method
from engine.pipeline import runner as pipeline
from engine.train import run as train
from scripts.launch import main
from tests.checkpoints import demo_folder  # noqa: F401
from tests.processes import TIMEOUT, in_a_group, start
from utils.build import import_target
from utils.image import read_mask

ROOT = Path(__file__).resolve().parents[2]
TOY_STAGE = '''
"""Writes a file, and its name into a diary; breaks where it is told to."""
import os
from pathlib import Path
from utils.distributed import rank

def run(options):
    out = Path(options["out"])
    assert not (out / "result.json").exists(), "a finished stage ran into its own output"
    (out / "half.json").write_text("0")
    with open(os.environ["TOY_DIARY"], "a") as diary:
        diary.write(f"{out.name} {options['value']} {rank()}\\n")
    if os.environ.get("TOY_BREAKS") == out.name:
        raise RuntimeError("the power is out")
    read = [p.read_text() for p in sorted(Path(options.get("reads", "/nowhere")).glob("result.json"))]
    (out / "result.json").write_text(str(options["value"]) + "".join(read))
'''
STAGES = [
    {"name": "first", "run": "toy_stage", "value": 1},
    {"name": "second", "run": "toy_stage", "value": 2, "reads": "${work_dir}/first"},
    {"name": "apart", "run": "toy_stage", "value": 3},
    {"name": "third", "run": "toy_stage", "value": 4, "reads": "${work_dir}/second"},
]
ALL = ["first", "second", "apart", "third"]


class World:
    """A pipeline of toy stages in a folder of its own."""

    def __init__(self, folder, data, monkeypatch):
        self.folder, self.data, self.monkeypatch = folder, data, monkeypatch
        self.config, self.run_folder, self.diary = folder / "toy.yaml", folder / "run", folder / "diary"
        (folder / "toy_stage.py").write_text(TOY_STAGE)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "toy_stage", raising=False)
        monkeypatch.setenv("TOY_DIARY", str(self.diary))
        self.write(STAGES)

    def write(self, stages, **more):
        content = {"base": "datasets/demo.yaml", "work_dir": str(self.run_folder), "stages": stages, **more}
        content["data"] = {"root": str(self.data), "num_workers": 0, **more.get("data", {})}
        self.config.write_text(yaml.safe_dump(content))

    def run(self, *overrides):
        """Stages that ran."""
        self.diary.write_text("")
        try:
            pipeline.run(self.config, ["device=cpu", *overrides])
        finally:
            self.ran = [line.split()[0] for line in self.diary.read_text().splitlines()]
        return self.ran

    def result(self, stage):
        return (self.run_folder / stage / "result.json").read_text()


@pytest.fixture
def toy(tmp_path, demo_folder, monkeypatch):  # noqa: F811
    return World(tmp_path, demo_folder, monkeypatch)


def test_stages_run_in_order_and_only_once(toy):
    assert toy.run() == ALL
    assert toy.result("third") == "421"
    assert toy.run() == []


def test_every_stage_leaves_a_picture_and_the_run_a_table(toy):
    toy.run()
    assert {path.stem for path in (toy.run_folder / "pictures").iterdir()} == set(ALL)
    table = (toy.run_folder / "table.txt").read_text()
    assert all(name in table for name in ALL)


def test_picture_of_a_stage_shows_the_images_that_it_worked_on(toy, monkeypatch):
    """The inference of the validation split is drawn on images of that split, the rest on training images."""
    drawn = {}
    monkeypatch.setattr(
        pipeline, "draw_stage", lambda folders, split, *rest: drawn.update({[*folders][-1]: split.name})
    )
    made_plans = pipeline.make_plans

    def with_images(*arguments):
        first, second, *others = made_plans(*arguments)
        data = to_plain(load_config(toy.config))["data"]
        return [first, dataclasses.replace(second, images=("test", data)), *others]

    monkeypatch.setattr(pipeline, "make_plans", with_images)
    toy.run()
    assert drawn == {"first": "train", "second": "test", "apart": "train", "third": "train"}


def test_stage_that_lost_its_scores_is_done_again(toy):
    toy.run()
    scores = toy.run_folder / "apart" / "scores.json"
    stamp = toy.run_folder / "apart" / "stage.json"
    content = json.loads(stamp.read_text())
    stamp.write_text(json.dumps(content | {"protocols": ["cam/train/ss"]}))
    with pytest.raises(AssertionError, match="ran into its own output"):
        toy.run()
    assert not scores.exists() and toy.ran == []


def test_what_depends_on_a_changed_stage_runs_again_and_nothing_else(toy):
    toy.run()
    assert toy.run("stages.second.value=7") == ["second", "third"]
    assert toy.result("third") == "471"
    assert (toy.run_folder / "replaced" / "second_1" / "result.json").read_text() == "21"
    assert toy.run("stages.second.value=7") == []


def test_stage_whose_folder_was_deleted_runs_again_with_all_that_depends_on_it(toy):
    toy.run()
    for file in (toy.run_folder / "first").iterdir():
        file.unlink()
    assert toy.run() == ["first", "second", "third"]


@pytest.mark.parametrize("name", ALL)
def test_interrupted_stage_goes_on_and_nothing_before_it_runs_again(toy, name):
    toy.monkeypatch.setenv("TOY_BREAKS", name)
    with pytest.raises(RuntimeError, match="power"):
        toy.run()
    toy.monkeypatch.delenv("TOY_BREAKS")
    toy.run()
    assert toy.ran == ALL[ALL.index(name) :]
    assert not (toy.run_folder / "replaced").exists() and toy.result("third") == "421"


def test_output_that_lost_a_file_is_made_again(toy):
    toy.run()
    (toy.run_folder / "second" / "result.json").unlink()
    assert toy.run() == ["second", "third"]


def test_other_training_images_are_another_pipeline_run(toy, tmp_path):
    toy.run()
    names = (toy.data / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    (tmp_path / "fewer.txt").write_text("\n".join(names[:2]))
    assert toy.run(f"data.train_set={tmp_path / 'fewer.txt'}") == ALL
    assert toy.result("third") == "421"


def test_what_the_same_settings_made_earlier_is_taken_back(toy):
    """Another value, tried and given up, costs nothing; nor does one that turns out wrong on the way."""
    toy.run()
    runs = runs_of(toy.run_folder, ALL)
    assert toy.run("stages.second.value=7") == ["second", "third"]
    assert toy.run() == [] and toy.result("third") == "421"
    assert runs_of(toy.run_folder, ALL) == runs
    assert toy.run("stages.second.value=7") == [] and toy.result("third") == "471"
    toy.monkeypatch.setenv("TOY_BREAKS", "first")
    with pytest.raises(RuntimeError, match="power"):
        toy.run("stages.first.value=5")
    assert toy.run() == [] and toy.result("third") == "421"


def test_half_finished_output_is_taken_back_and_goes_on(toy):
    toy.monkeypatch.setenv("TOY_BREAKS", "apart")
    with pytest.raises(RuntimeError, match="power"):
        toy.run()
    (toy.run_folder / "apart" / "more.json").write_text("half of it")
    with pytest.raises(RuntimeError, match="power"):
        toy.run("stages.apart.value=7")
    assert not (toy.run_folder / "apart" / "more.json").exists()
    toy.monkeypatch.delenv("TOY_BREAKS")
    assert toy.run() == ["apart", "third"]
    assert (toy.run_folder / "apart" / "more.json").read_text() == "half of it"


def test_pictures_show_what_was_taken_back(toy, monkeypatch):
    drawn = []
    monkeypatch.setattr(pipeline, "draw_stage", lambda folders, *rest: drawn.append([*folders][-1]))
    toy.run()
    toy.run("stages.second.value=7")
    drawn.clear()
    toy.run()
    assert drawn == ["second", "apart", "third"]


def test_stage_of_ones_own_names_its_options_as_it_likes(toy):
    toy.write([{**STAGES[0], "images": "train", "labels": "none", "input": "rgb"}])
    assert toy.run() == ["first"]


def test_earlier_output_that_lost_a_file_is_not_taken_back(toy):
    toy.run()
    toy.run("stages.third.value=7")
    (toy.run_folder / "replaced" / "third_1" / "result.json").unlink()
    assert toy.run() == ["third"] and toy.result("third") == "421"


def test_content_of_a_file_counts_not_its_place(toy, tmp_path):
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / f"{name}.txt").write_text(content)
    run = lambda name: toy.run(f"stages.first.note={tmp_path / name}.txt")  # noqa: E731
    assert run("a") == ALL
    assert run("b") == []
    assert run("c") == ["first", "second", "third"]


def test_folder_of_something_else_is_moved_not_overwritten(toy):
    (toy.run_folder / "apart").mkdir(parents=True)
    (toy.run_folder / "apart" / "thesis.json").write_text("{}")
    toy.run()
    assert (toy.run_folder / "replaced" / "apart_1" / "thesis.json").is_file()


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([{"name": "a", "run": "tools.infer_cm"}], ImportError, r"stage 'a'.*did you mean 'tools.infer_cam'"),
        ([{"name": "a", "run": "ops.cam"}], ImportError, r"stage 'a'.*no function run"),
        ([{"name": "a"}], ValueError, r"stage 'a' .*does not say what to run"),
        ([{"run": "toy_stage"}], ValueError, "needs a name"),
        ([STAGES[0], STAGES[0]], ValueError, "needs a name of its own"),
        ([{"name": "a", "run": "engine.train"}], ValueError, "does not name its config"),
        (
            [{"name": "a", "run": "engine.train", "config": "cam/demo.yaml", "trian": {"steps": 2}}],
            KeyError,
            r"stage 'a'.*'trian.steps' is not a key: did you mean 'train.steps'",
        ),
        (
            [{"name": "a", "run": "engine.train", "config": "cam/demo.yaml", "method": {"cam_scals": [1]}}],
            KeyError,
            r"stage 'a'.*did you mean 'method.cam_scales'",
        ),
        (
            [{"name": "a", "run": "tools.infer_cam", "model_path": "x.pth", "scals": [1.0]}],
            KeyError,
            r"stage 'a': .*did you mean 'scales'",
        ),
        ([{"name": "a", "run": "tools.infer_cam"}], ValueError, r"stage 'a': .*'model_path' is missing"),
        (
            [{"name": "a", "run": "toy_stage", "value": 1}, {**STAGES[1], "reads": "${work_dir}/b"}],
            ValueError,
            r"stage 'second': reads is .*no stage before it writes; known: a",
        ),
        ([{"name": "a", "run": "tools.infer_cam", "model_path": "${nowhere}"}], ValueError, "nowhere"),
        (
            [{"name": "a", "run": "tools.make_affinity_label", "cam": "x", "out": "y", "mode": "ir"}],
            ValueError,
            r"stage 'a': mode .*did you mean 'irn'",
        ),
        (
            [{"name": "a", "run": "tools.infer_cam", "model_path": "x.pth", "stride": "two"}],
            ValueError,
            r"stage 'a': stride",
        ),
        (
            [{"name": "a", "run": "tools.infer_cam", "model_path": "x.pth", "scales": 1.0}],
            ValueError,
            r"stage 'a': scales",
        ),
        (
            [{"name": "a", "run": "tools.infer_seg", "model_path": "x.pth", "flip": "yes"}],
            ValueError,
            r"stage 'a': flip",
        ),
        (
            [{"name": "a", "run": "engine.train", "config": "toco/demo.yaml", "method": {"head": {"a": 1}}}],
            KeyError,
            r"stage 'a': 'a' is not an argument of method.head",
        ),
        (
            [
                {
                    "name": "a",
                    "run": "engine.train",
                    "config": "cam/demo.yaml",
                    "train": {"batch_size": 3},
                    "data": {"context_decoupling": {"bank": "objects"}},
                }
            ],
            ValueError,
            r"stage 'a': train.batch_size=3 .* choose a multiple of 2",
        ),
        (
            [{"name": "a", "run": "tools.infer_seg", "model_path": "x.pth", "crf": "tocoo"}],
            ValueError,
            r"stage 'a': crf",
        ),
        (
            [{"name": "a", "run": "tools.infer_cam", "model_path": "x.pth", "size": "large"}],
            ValueError,
            "stage 'a': size",
        ),
        (
            [{"name": "a", "run": "tools.propagate_cam", "model_path": "x.pth", "cam": "y", "beta": 3}],
            KeyError,
            "'beta' is not an option",
        ),
        (
            [
                {"name": "a", "run": "tools.make_affinity_label", "cam": "x", "mode": "irn"}
                | {"foreground_threshold": 0.01}
            ],
            ValueError,
            "stage 'a': background_threshold=0.05 must be below foreground_threshold=0.01",
        ),
        (
            [
                {"name": "a", "run": "engine.train", "config": "cam/demo.yaml"},
                {"name": "b", "run": "tools.infer_cam", "model_path": "${work_dir}/a/last.pth"}
                | {"overrides": ["method.cam_scals=[1.0]"]},
            ],
            KeyError,
            "stage 'b': 'cam_scals' is not an argument",
        ),
        (
            [
                {
                    "name": "a",
                    "run": "engine.train",
                    "config": "segmentor/demo.yaml",
                    "data": {"label_dir": "no/where"},
                }
            ],
            FileNotFoundError,
            "stage 'a': data.label_dir is no/where, where there is nothing",
        ),
        (
            [{"name": "a", "run": "engine.train", "config": "cam/demo.yaml", "data": {"train_set": "trian"}}],
            FileNotFoundError,
            "trian.txt is missing",
        ),
        (
            [
                {"name": "a", "run": "engine.train", "config": "cam/demo.yaml"}
                | {"method": {"backbone": {"pretrained": "no/weights.pth"}}}
            ],
            FileNotFoundError,
            "stage 'a': method.backbone.pretrained is no/weights.pth, where there is nothing",
        ),
        (
            [
                {
                    "name": "a",
                    "run": "tools.make_affinity_label",
                    "cam": "x",
                    "mode": "irn",
                    "out": "elsewhere",
                }
            ],
            ValueError,
            "stage 'a' always writes to .*/run/a",
        ),
        ([{"name": "a", "like": "b"}], KeyError, "is like 'b', which is no stage"),
        (
            [{"name": "a", "run": "engine.train", "config": "cam/demo.yaml", "train": {"resume": "never"}}],
            ValueError,
            r"delete .*run/a",
        ),
    ],
)
def test_wrong_stage_is_one_clear_error_before_anything_runs(toy, stages, error, message):
    toy.write([*stages])
    with pytest.raises(error, match=message):
        toy.run()
    assert toy.ran == []


def test_inference_without_a_validation_split_is_told_before_the_first_stage(toy):
    stages = [
        {"name": "a", "run": "engine.train", "config": "cam/demo.yaml"},
        {"name": "b", "run": "tools.infer_cam", "model_path": "${work_dir}/a/last.pth"},
    ]
    toy.write(stages, data={"val_set": None})
    with pytest.raises(
        ValueError, match=r"stage 'b' works on data.val_set.*stages.b.infer=SPLIT.*stages.b=null"
    ):
        toy.run()
    assert not (toy.run_folder / "a").exists()


def test_missing_input_names_the_file(toy):
    toy.write([{"name": "a", "run": "tools.infer_cam", "model_path": "logs/nobody/last.pth"}])
    with pytest.raises(FileNotFoundError, match=r"stage 'a': model_path is logs/nobody/last\.pth, where"):
        toy.run()


def test_unknown_stage_on_the_command_line(toy):
    with pytest.raises(KeyError, match=r"no stage 'secnd': did you mean 'second'"):
        toy.run("stages.secnd.value=3")
    for wrong in ("stages.second.like=first", "stages.second=3", "stages=3", "stages=null"):
        with pytest.raises(ValueError, match=r"the command line: stages"):
            toy.run(wrong)


def test_command_line_chooses_what_a_stage_runs_and_by_which_config(toy):
    """And leaves stages out; pipeline.yaml says the same."""
    overrides = [
        "stages.segment.config=bench/configs/segmentor/mini.yaml",
        "stages.infer.run=tools.infer_cam",
    ]
    overrides += ["stages.scores=null", "stages.cam_scores=null"]
    stages = {stage.name: stage for stage in load_stages("configs/irn/voc.yaml", overrides)}
    assert stages["segment"].options["method"]["backbone"]["name"] == "deit_tiny_patch16_224"
    assert stages["infer"].run == "tools.infer_cam" and not {"scores", "cam_scores"} & set(stages)
    said = {s["name"]: s for s in to_plain(load_config("configs/irn/voc.yaml", overrides))["stages"]}
    assert list(said) == list(stages)
    assert (
        said["segment"]["config"] == "bench/configs/segmentor/mini.yaml"
        and said["infer"]["run"] == "tools.infer_cam"
    )
    assert toy.run("stages.apart=null") == ["first", "second", "third"]


def test_home_folder_in_the_work_dir(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    toy.run_folder = tmp_path / "deep" / "run"
    toy.write(STAGES)
    toy.config.write_text(toy.config.read_text().replace(str(toy.run_folder), "~/deep/run"))
    assert toy.run() == ALL and toy.result("third") == "421"


def child_of(toy, stages):
    child = toy.folder / "child.yaml"
    child.write_text(yaml.safe_dump({"base": str(toy.config), "stages": stages}))
    return child


def test_file_changes_adds_and_removes_stages_by_name(toy):
    child = child_of(
        toy, {"second": {"value": 9}, "apart": None, "twin": {"like": "second", "reads": "${work_dir}/third"}}
    )
    stages = {stage.name: stage.options for stage in load_stages(child)}
    assert list(stages) == ["first", "second", "third", "twin"]
    assert stages["second"]["value"] == stages["twin"]["value"] == 9
    assert stages["twin"]["reads"] == f"{toy.run_folder}/third"
    changed = {stage.name: stage.options for stage in load_stages(child, ["stages.second.value=5"])}
    assert changed["second"]["value"] == changed["twin"]["value"] == 5
    with pytest.raises(KeyError, match="no stage 'secnd'"):
        load_config(child_of(toy, {"secnd": {"value": 9}}))


def test_override_of_a_stage_spares_what_its_likes_set_themselves(toy):
    """Both what runs and what pipeline.yaml says."""
    name = "configs/irn/voc_cda.yaml"
    overrides = [
        "stages.cam.model_path=other.pth", "stages.cam.size=320", "stages.cam_net.train.steps=7",
        "stages.cam_net.train.batch_size=4", "stages.segment.data.label_dir=elsewhere",
        "stages.infer_cda.crf=seco", "stages.objects.min_share=0.2", "train.log_every=9",
    ]  # fmt: skip
    stages = {stage.name: stage.options for stage in load_stages(name, overrides)}
    said = {stage["name"]: stage for stage in to_plain(load_config(name, overrides))["stages"]}
    for stage, options in stages.items():
        for key, value in pipeline._leaves({k: v for k, v in said[stage].items() if k not in STAGE_KEYS}):
            assert dict(pipeline._leaves(options))[key] == value, (stage, key)
    assert (
        stages["cam_cda"]["model_path"].endswith("/cam_net_cda/last.pth") and stages["cam_cda"]["size"] == 320
    )
    assert stages["cam_net_cda"]["train"]["steps"] == 6610 and stages["cam_net"]["train"]["steps"] == 7
    assert stages["cam_net_cda"]["train"]["batch_size"] == 4
    assert stages["segment_cda"]["data"]["label_dir"].endswith("/pseudo_cda")
    assert (stages["infer"]["crf"], stages["infer_cda"]["crf"]) == ("toco", "seco")


def test_later_values_win_in_a_training_stage(toy):
    train = {"name": "net", "run": "engine.train", "config": "cam/demo.yaml"}
    stages = [{**train, "train": {"steps": 3}}, {**train, "name": "other"}]
    toy.write(stages, train={"steps": 2, "batch_size": 6})

    def steps(*overrides):
        return [stage.options["train"]["steps"] for stage in load_stages(toy.config, overrides)]

    assert steps() == [3, 2]
    assert steps("train.steps=4") == [4, 4]
    assert steps("train.steps=4", "stages.net.train.steps=5") == [5, 4]
    net, other = load_stages(toy.config)
    assert net.options["train"]["batch_size"] == 6 and net.options["data"]["root"] == str(toy.data)
    assert net.options["work_dir"] == f"{toy.run_folder}/net" != other.options["work_dir"]
    assert net.options["method"]["target"] == "methods.cam.CAMNetwork"
    assert "stages" not in net.options or net.options["stages"] is None


def test_help_lists_the_stages(toy):
    text = describe(toy.config)
    assert "stages.second.value = 2" in text and "data.root" in text


def test_single_training_has_no_stages():
    with pytest.raises(ValueError, match="single training"):
        load_stages("configs/cam/demo.yaml")


NETWORKS = {}
PIPELINES = [
    str(path.relative_to(ROOT))
    for method in ("irn", "psa", "seam")
    for configs in (CONFIGS, ROOT / "bench/configs")
    for path in sorted((configs / method).glob("*.yaml"))
    if path.stem not in ("cam_net", "affinity")  # the trainings inside
]


@pytest.mark.parametrize("name", PIPELINES)
def test_stages_of_a_shipped_pipeline_fit_their_tools(name, monkeypatch):
    """Every option exists, every folder that is read was written before, every network can be built."""
    cfg, built = load_config(name), []

    def record(cfg, *arguments, **options):  # pipelines share their networks
        key = json.dumps([cfg["method"], *arguments, options])
        if key not in NETWORKS:
            NETWORKS[key] = build_method(cfg, *arguments, **options)
        built.append(NETWORKS[key])
        return built[-1]

    monkeypatch.setattr("engine.checks.build_method", record)
    plans = pipeline.make_plans(cfg, load_stages(name), pipeline._tool_overrides(name, []), num_classes=21)
    folders = [str(plan.options["data"]["label_dir"]) for plan in plans if plan.trains]
    assert any(folder.endswith("/pseudo") for folder in folders) and len(built) >= len(folders)
    for plan in plans:  # the second round knows the first one by its objects alone
        if plan.stage.name.endswith("_cda"):
            text = json.dumps(plan.stage.options)
            read = set(re.findall(re.escape(cfg.work_dir) + r"/(\w+)", text)) - {plan.stage.name}
            assert all(stage.endswith("_cda") or stage == "objects" for stage in read), plan.stage.name


PLANS = "configs/seam/demo.yaml"


def plans_of(overrides=(), config=PLANS):
    stages = load_stages(config, overrides)
    given = pipeline._tool_overrides(config, overrides)
    plans = pipeline.make_plans(load_config(config, overrides), stages, given, num_classes=7)
    return {plan.stage.name: plan for plan in plans}


def settings_of(plan):
    runs = dict.fromkeys(("cam_net", "cam", "seeds", "affinity", "pseudo", "segment", "infer"), "x")
    return pipeline._settings(plan, runs, "logs/seam_demo", "data")


def test_a_batch_that_cannot_be_divided_is_refused_before_the_first_stage(demo_folder):  # noqa: F811
    root = f"data.root={demo_folder}"
    with pytest.raises(ValueError, match="stage 'segment': train.batch_size=3 .* choose a multiple of 2"):
        plans_of([root, "train.batch_size=4", "train.accumulate=2", "stages.segment.train.batch_size=3"])
    bank = "stages.segment.data.context_decoupling.bank=objects"
    with pytest.raises(ValueError, match="originals and their pasted versions.* choose a multiple of 2"):
        plans_of([root, bank, "stages.segment.train.batch_size=3"])


def test_change_of_the_inference_repeats_the_inference_and_no_training(demo_folder):  # noqa: F811
    root = f"data.root={demo_folder}"
    before, after = (plans_of([root, *more]) for more in ((), ("infer.scales=[1.0,1.5]", "infer.flip=false")))
    changed = [name for name in before if settings_of(before[name]) != settings_of(after[name])]
    assert changed == ["infer", "shuffled"]
    overrides = after["infer"].options["overrides"]
    assert {"infer.scales=[1.0, 1.5]", "infer.flip=false"} <= set(overrides)
    cfg = override_config(OmegaConf.create(dict(before["segment"].options)), overrides)
    assert to_plain(cfg)["infer"] == after["segment"].options["infer"]


def test_checkpoint_from_elsewhere_gets_what_the_command_line_says_of_the_inference(toy, tmp_path):
    checkpoint = tmp_path / "some.pth"
    checkpoint.touch()
    toy.write([{"name": "a", "run": "tools.infer_seg", "model_path": str(checkpoint), "infer": "test"}])
    plan = plans_of(["infer.flip=false"], toy.config)["a"]
    assert plan.options["overrides"] == ["infer.flip=false"]


def test_overrides_of_a_stage_reach_its_tool_and_count(demo_folder):  # noqa: F811
    root = f"data.root={demo_folder}"
    stage = "stages.pseudo.overrides"
    plain = plans_of([root])["pseudo"]
    plan = plans_of([root, f"{stage}=[method.beta=3]"])["pseudo"]
    assert plan.options["overrides"] == [root, "method.beta=3"]
    found, expected = settings_of(plan), settings_of(plain)
    assert found == expected | {"overrides.method.beta": "3"}
    for wrong in ("method.beta=3", "[3]", "[beta]"):
        with pytest.raises(ValueError, match=r"stage 'pseudo': overrides"):
            plans_of([f"{stage}={wrong}"])


def test_other_images_of_the_split_that_a_stage_works_on_are_another_input(demo_folder, tmp_path):  # noqa: F811
    root = tmp_path / "data"
    shutil.copytree(demo_folder, root)
    infer, seeds = (plans_of([f"data.root={root}"])[name] for name in ("infer", "seeds"))
    before = settings_of(infer), settings_of(seeds)
    names = list(read_list(root / "ImageSets" / "Segmentation" / "test.txt"))
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("\n".join(names[:-1]))
    assert settings_of(infer) != before[0] and settings_of(seeds) == before[1]


def test_folder_that_is_read_counts_with_all_its_files(toy, tmp_path):
    given, stages = tmp_path / "given", [{**STAGES[0], "note": str(tmp_path / "given")}]
    given.mkdir()
    toy.write(stages)
    assert toy.run() == ["first"]
    for name in ("a.npy", "b.jpg", "sub/c"):
        (given / name).parent.mkdir(exist_ok=True)
        (given / name).write_text("x")
        assert toy.run() == ["first"], name
    assert toy.run() == []


def test_output_that_lost_an_array_is_made_again(toy):
    toy.write(STAGES[:1])
    toy.run()
    folder = toy.run_folder / "first"
    (folder / "more.npy").write_text("x")
    with pytest.raises(AssertionError, match="ran into its own output"):
        toy.run()


def small(folder):
    """Overrides of a run that takes a second."""
    return [
        f"data.root={folder}", "data.crop_size=48", "data.num_workers=0", "eval.size=48", "train.steps=2",
        "train.batch_size=4", "train.checkpoint_every=1", "train.eval_every=100", "optim.warmup_steps=0",
        "method.backbone.width=32", "method.backbone.depth=4", "method.backbone.heads=2", "device=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def odd_images(demo_folder, tmp_path_factory):  # noqa: F811
    """Four training images, one of them without tags and one with all tags."""
    root = tmp_path_factory.mktemp("odd") / "data"
    shutil.copytree(demo_folder, root)
    names = list(read_list(root / "ImageSets" / "Segmentation" / "train.txt"))
    classes = read_class_names("class_names.txt", root, ())
    tags = {name: [classes[k] for k in ids] for name, ids in read_tags(root / "tags.csv", classes).items()}
    tags[names[0]], tags[names[1]], tags[names[2]] = [], list(classes[1:]), tags[names[2]] or [classes[1]]
    write_tags(root / "tags.csv", tags)
    return root


@pytest.mark.parametrize("config", ["configs/psa/demo.yaml", "configs/seam/demo.yaml"])
def test_whole_pipeline_runs(config, odd_images, tmp_path, monkeypatch, capsys):
    """By the command line of a single training, on images without tags and with all of them."""
    run = tmp_path / "run"
    arguments = [f"config={config}", f"work_dir={run}", "stages.seeds.processes=0", *small(odd_images)]
    monkeypatch.setattr(sys, "argv", ["train_voc.py", *arguments])
    main(default_config="configs/toco/voc.yaml", doc="")
    assert_complete(run, config, rounds=1)
    capsys.readouterr()

    # A key that does not change what is computed runs nothing again.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("last.pth")}
    sys.argv.append("train.log_every=7")
    main(default_config="configs/toco/voc.yaml", doc="")
    assert capsys.readouterr().out.count("unchanged") >= len(load_stages(config))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("last.pth")} == before


def assert_complete(run, config, rounds):
    """Every stage has left a picture and every round its scores."""
    assert {path.stem for path in (run / "pictures").iterdir()} == {
        stage.name for stage in load_stages(config)
    }
    table = (run / "table.txt").read_text()
    for protocol in ("cam/train/", "pseudo/train/walk", "seg/test/ss+flip", "seg/test_shuffled/ss+flip"):
        assert table.count(protocol) >= rounds


@pytest.mark.parametrize("method", ["irn", "psa"])
def test_pipeline_runs_on_own_images_without_masks(method, tmp_path):
    """Two classes, an image without any; CNN options that a ViT does not have are taken back."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(images / f"{name}.png")
    (tmp_path / "tags.csv").write_text("name,tags\na,cat\nb,cat;dog\nc,\nd,dog\n")
    vit = ["name=vit_demo", "pretrained=null", "pyramid=true", "frozen=null", "train_affine=null"]
    arguments = [
        f"work_dir={tmp_path / 'run'}", *small(tmp_path), *(f"method.backbone.{option}" for option in vit),
        "stages.cam.scales=[1.0]", "stages.seeds.processes=0", "infer.scales=[1.0]", "train.precision=fp32",
        "stages.affinity.method.radius=3", "stages.segment.method.backbone.pyramid=true",
    ]  # fmt: skip
    pipeline.run(f"configs/{method}/custom.yaml", arguments)
    labels = {path.stem: read_mask(path) for path in (tmp_path / "run" / "infer").glob("*.png")}
    assert sorted(labels) == list("abcd") and all(label.shape == (40, 56) for label in labels.values())
    assert not read_mask(tmp_path / "run" / "pseudo" / "c.png").any()


def run_until_the_first_output(stage, arguments):
    """A pipeline that is killed right after a stage has written its first file."""
    replace = os.replace

    def replace_and_die(source, target):
        replace(source, target)
        if stage in Path(target).parts and Path(target).suffix in (".pth", ".npz", ".png"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die
    pipeline.run("configs/irn/demo_cda.yaml", arguments)


@pytest.fixture(scope="module")
def finished_pipeline(odd_images, tmp_path_factory):
    """Arguments of a finished run of two rounds, and all its pseudo labels."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = [
        f"work_dir={folder}", "stages.seeds.processes=0", "stages.objects.min_share=0.0",
        "stages.objects.max_share=1.0", *small(odd_images), "train.steps=3",
    ]  # fmt: skip
    pipeline.run("configs/irn/demo_cda.yaml", arguments)
    return folder, arguments, pseudo_labels(folder)


def pseudo_labels(folder):
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in folder.glob("pseudo*/*.png")}


def runs_of(folder, names):
    return [json.loads((folder / name / "stage.json").read_text())["run"] for name in names]


def test_two_rounds_run(finished_pipeline):
    folder, _, labels = finished_pipeline
    assert_complete(folder, "configs/irn/demo_cda.yaml", rounds=2)
    assert "objects " in (folder / "cam_net_cda" / "run.log").read_text()
    assert len(labels) == 8


def test_scores_that_were_lost_come_back_and_nothing_else_runs(finished_pipeline, capsys):
    """Neither for a key that does not change what is computed."""
    folder, arguments, expected = finished_pipeline
    for stage in ("cam", "pseudo"):
        (folder / stage / "scores.json").unlink()
    (folder / "cam_net" / "scores.json").unlink()  # of a training, whose validation is not repeated
    pipeline.run("configs/irn/demo_cda.yaml", [*arguments, "train.log_every=7"])
    out = capsys.readouterr().out
    assert re.findall(r"stage \d+/\d+ (\w+) .*goes on", out) == ["cam", "pseudo"]
    assert out.count(": unchanged") == len(load_stages("configs/irn/demo_cda.yaml")) - 2
    assert all((folder / stage / "scores.json").is_file() for stage in ("cam", "pseudo"))
    assert pseudo_labels(folder) == expected


@pytest.mark.parametrize("stage", ["cam_net_cda", "pseudo_cda"])
def test_pipeline_that_was_killed_ends_with_the_same_pseudo_labels(finished_pipeline, stage):
    """In the middle of a training, of a walk; stages before it stay as they are.

    So they do when the folder of the run gets another name in between.
    """
    folder, arguments, expected = finished_pipeline
    names = [s.name for s in load_stages("configs/irn/demo_cda.yaml")]
    names = names[: names.index(stage)]
    before = runs_of(folder, names)
    shutil.rmtree(folder / stage)
    killed = start(run_until_the_first_output, stage, arguments)
    killed.join(TIMEOUT)
    assert killed.exitcode == -signal.SIGKILL
    outputs = [p for p in (folder / stage).rglob("*") if p.suffix in (".pth", ".npz", ".png")]
    assert len(outputs) == 1 and json.loads((folder / stage / "stage.json").read_text())["run"] is None
    written = outputs[0].stat().st_mtime_ns
    moved = folder.with_name("moved")
    folder.rename(moved)
    pipeline.run("configs/irn/demo_cda.yaml", [f"work_dir={moved}", *arguments[1:]])
    moved.rename(folder)
    assert pseudo_labels(folder) == expected and len(expected) == 8
    assert stage == "cam_net_cda" or outputs[0].stat().st_mtime_ns == written
    assert runs_of(folder, names) == before


@pytest.mark.parametrize("config", ["toco/demo.yaml", "seco/demo.yaml", "ws_fcn/demo.yaml"])
def test_single_stage_methods_train_with_pasted_objects(config, finished_pipeline, odd_images, tmp_path):
    """The bank of a pipeline plugs into every method by one key; half of a batch are originals."""
    bank = finished_pipeline[0] / "objects"
    overrides = [f"work_dir={tmp_path / 'run'}", f"data.context_decoupling.bank={bank}", *small(odd_images)]
    seen = []

    def record(method, batch):
        seen.append((batch["image"].clone(), batch["class_label"].clone(), batch["sample_seed"].clone()))

    cfg = load_config(f"configs/{config}", overrides)
    target = import_target(cfg.method.target)
    original = target.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            target, "training_step", lambda self, b, step: (record(self, b), original(self, b, step))[1]
        )
        train(cfg)
    assert (tmp_path / "run" / "last.pth").is_file() and len(seen) == 2
    for image, class_label, sample_seed in seen:
        assert len(image) == 4 and (class_label[2:] >= class_label[:2]).all()
        assert len(set(sample_seed.tolist())) == 4  # pasted versions draw for themselves
    assert any((label[2:] > label[:2]).any() for _, label, _ in seen)


def run_as_a_process(rank, config, arguments):
    pipeline.run(config, arguments)


def run_toy_as_a_process(rank, folder, config):
    sys.path.insert(0, str(folder))
    pipeline.run(config, ["device=cpu"])


def test_two_processes_make_the_labels_of_one(finished_pipeline, odd_images, tmp_path):
    """Trainings, inference and random walk are shared out; up to rounding nothing depends on it."""
    arguments = [f"work_dir={tmp_path / 'run'}", "stages.seeds.processes=0", *small(odd_images)]
    in_a_group(run_as_a_process, "configs/irn/demo.yaml", [*arguments, "train.steps=3"])
    alone, shared = (
        np.stack([read_mask(path) for path in sorted((folder / "pseudo").glob("*.png"))])
        for folder in (finished_pipeline[0], tmp_path / "run")
    )
    assert alone.shape == shared.shape and (alone == shared).mean() > 0.98
    protocols = {row.split("|")[2] for row in (tmp_path / "run" / "table.txt").read_text().splitlines()[2:]}
    assert {"seg/test/ss+flip", "seg/test_shuffled/ss+flip"} <= {text.strip() for text in protocols}


def test_two_processes_do_every_stage_once(toy):
    """A stage that does not share its work out runs in the main process; the other one waits."""
    in_a_group(run_toy_as_a_process, toy.folder, toy.config)
    assert [line.split() for line in toy.diary.read_text().splitlines()] == [
        [stage["name"], str(stage["value"]), "0"] for stage in STAGES
    ]
    stamps = {name: json.loads((toy.run_folder / name / "stage.json").read_text()) for name in ALL}
    assert all(stamp["run"] for stamp in stamps.values())
