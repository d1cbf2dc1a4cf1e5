"""Pipelines: stages run in order, what is unchanged is not done again, what was interrupted continues."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from datasets.base import Record, Split
from datasets.lists import read_class_names, read_list
from datasets.tags import read_tags, write_tags
from engine.config.load import CONFIGS, load_config, load_stages, override_config, to_plain
from engine.config.stages import STAGE_KEYS
from engine.method import build_method
from engine.pipeline import plan as planning
from engine.pipeline import runner as pipeline
from engine.pipeline.plan import make_plans
from engine.train import run as train
from scripts.launch import main
from tests.checkpoints import demo_folder  # noqa: F401
from tests.processes import TIMEOUT, in_a_group, start
from utils.build import import_target
from utils.image import read_mask
from utils.mappings import leaves

ROOT = Path(__file__).resolve().parents[2]
TOY_STAGE = '''
"""Writes a file, and its name into a diary; breaks where it is told to."""
import os
from dataclasses import dataclass
from pathlib import Path
from engine.config.options import option
from utils.distributed import rank

@dataclass(kw_only=True)
class Options:
    value: int = option(meaning="what it writes")
    before: Path | None = option(None, "folder of an earlier stage", reads=True)
    note: Path | None = option(None, "any file or folder", reads=True)
    infer: str | None = option(None, "images", reads="images")
    speed: int = option(1, "changes nothing", free=True)
    out: Path = option(meaning="where it writes")

def run(options):
    out = options.out
    assert not (out / "result.json").exists(), "a finished stage ran into its own output"
    out.mkdir(exist_ok=True)
    (out / "half.json").write_text("0")
    with open(os.environ["TOY_DIARY"], "a") as diary:
        diary.write(f"{out.name} {options.value} {rank()}\\n")
    if os.environ.get("TOY_BREAKS") == out.name:
        raise RuntimeError("the power is out")
    read = (options.before / "result.json").read_text() if options.before else ""
    (out / "result.json").write_text(f"{options.value}{read}")
'''
STAGES = [
    {"name": "first", "run": "toy_stage", "value": 1, "infer": "train"},
    {"name": "second", "run": "toy_stage", "value": 2, "before": "${work_dir}/first"},
    {"name": "apart", "run": "toy_stage", "value": 3, "infer": "test"},
    {"name": "third", "run": "toy_stage", "value": 4, "before": "${work_dir}/second"},
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

    def run_broken(self, stage, *overrides):
        """A run that ends in the middle of a stage."""
        self.monkeypatch.setenv("TOY_BREAKS", stage)
        with pytest.raises(RuntimeError, match="power"):
            self.run(*overrides)
        self.monkeypatch.delenv("TOY_BREAKS")

    def result(self, stage):
        return (self.run_folder / stage / "result.json").read_text()


@pytest.fixture
def toy(tmp_path, demo_folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pipeline, "draw_stage", lambda *_: None)
    return World(tmp_path, demo_folder, monkeypatch)


def test_stages_run_in_order_and_only_once(toy):
    """A folder of something else is moved, not overwritten."""
    (toy.run_folder / "apart").mkdir(parents=True)
    (toy.run_folder / "apart" / "thesis.json").write_text("{}")
    assert toy.run() == ALL
    assert (toy.run_folder / "apart_old_1" / "thesis.json").is_file()
    assert toy.result("third") == "421"
    assert all(name in (toy.run_folder / "table.txt").read_text() for name in ALL)
    assert toy.run("stages.first.speed=7") == []


def test_what_depends_on_a_changed_stage_runs_again_and_nothing_else(toy):
    """Old outputs get another name."""
    toy.run()
    assert toy.run("stages.second.value=7") == ["second", "third"]
    assert toy.result("third") == "471"
    assert (toy.run_folder / "second_old_1" / "result.json").read_text() == "21"
    assert toy.run("stages.second.value=7") == []
    assert toy.run() == ["second", "third"] and toy.result("third") == "421"
    assert (toy.run_folder / "second_old_2" / "result.json").read_text() == "71"


def test_lost_output_is_made_again_with_all_that_depends_on_it(toy):
    """In the same folder or in one that was moved."""
    toy.run()
    toy.run_folder.rename(toy.folder / "moved")
    toy.run_folder = toy.folder / "moved"
    moved = f"work_dir={toy.run_folder}"
    assert toy.run(moved) == []
    (toy.run_folder / "second" / "result.json").unlink()
    assert toy.run(moved) == ["second", "third"]
    shutil.rmtree(toy.run_folder / "first")
    assert toy.run(moved) == ["first", "second", "third"]


@pytest.mark.parametrize("name", ["first", "third"])
def test_interrupted_stage_continues_and_nothing_before_it_runs_again(toy, name):
    toy.run_broken(name)
    assert (toy.run_folder / name / "half.json").is_file()
    assert toy.run() == ALL[ALL.index(name) :]
    assert not list(toy.run_folder.glob("*_old_*")) and toy.result("third") == "421"


def test_content_of_what_is_read_counts_not_its_place(toy, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    toy.write(STAGES[:2])
    for name, content, ran in (("a", "1", ALL[:2]), ("b", "1", []), ("c", "2", ALL[:2])):
        (tmp_path / f"{name}.txt").write_text(content)
        assert toy.run(f"stages.first.note={tmp_path / name}.txt") == ran
    toy.write([{**STAGES[0], "note": str(given)}])
    assert toy.run() == ["first"]
    for name in ("a.npy", "sub/c"):
        (given / name).parent.mkdir(exist_ok=True)
        (given / name).write_text("x")
        assert toy.run() == ["first"], name
    assert toy.run() == []


def test_other_images_of_the_split_that_a_stage_works_on_are_another_input(toy, tmp_path):
    toy.run()
    names = list(read_list(toy.data / "ImageSets" / "Segmentation" / "train.txt"))
    (tmp_path / "fewer.txt").write_text("\n".join(names[:2]))
    assert toy.run(f"stages.first.infer={tmp_path / 'fewer.txt'}") == ["first", "second", "third"]


NET = {"name": "a", "run": "engine.train", "config": "cam/demo.yaml"}
CAM = {"name": "a", "run": "tools.infer_cam", "model_path": "${work_dir}/a/last.pth", "infer": "test"}
SEEDS = {"name": "a", "run": "tools.make_affinity_label", "cam": "x"}
PASTED, NO_LABELS = {"data": {"context_decoupling": {"bank": "objects"}}}, {"data": {"label_dir": "no/where"}}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "a", "run": "tools.infer_cm"}], "module 'tools.infer_cm'"),
        ([STAGES[0], STAGES[0]], "needs a name"),
        ([{"name": "a", "run": "engine.train"}], "needs config"),
        ([{**NET, "trian": {"steps": 2}}], "did you mean 'train.steps'"),
        ([{**NET, "train": {"resume": "never"}}], "delete .*run/a"),
        ([{**NET, "data": {"train_set": "trian"}}], "trian.txt"),
        ([{**NET, "train": {"batch_size": 3}, **PASTED}], "a multiple of 2"),
        ([{**NET, "config": "segmentor/demo.yaml", **NO_LABELS}], "label_dir"),
        ([{**CAM, "model_path": "logs/nobody/last.pth"}], "model_path"),
        ([{**CAM, "scals": [1.0]}], "did you mean 'scales'"),
        ([NET, {**CAM, "name": "b", "overrides": ["method.cam_scals=[1.0]"]}], "'cam_scals'"),
        ([{**SEEDS, "out": "elsewhere"}], "always writes to .*run/a"),
        ([STAGES[0], {**STAGES[1], "before": "${work_dir}/b"}], "no stage before"),
    ],
)
def test_wrong_stage_is_one_clear_error_before_anything_runs(toy, stages, message):
    toy.write([STAGES[2], *stages])
    with pytest.raises((KeyError, ValueError), match=message) as raised:
        toy.run()
    assert toy.ran == [] and "stage" in str(raised.value)


def test_command_line_chooses_what_a_stage_runs_and_by_which_config():
    """And leaves stages out."""
    overrides = [
        "stages.segment.config=segmentor/coco.yaml",
        "stages.infer.run=tools.infer_cam",
        "stages.cam_net.method.background_threshold=0.4",
        "stages.scores=null",
    ]
    stages = {stage.name: stage for stage in load_stages("configs/irn/voc.yaml", overrides)}
    assert stages["segment"].options["train"]["steps"] == 50000 and stages["infer"].run == "tools.infer_cam"
    assert "cam_scores" in stages and "scores" not in stages
    assert stages["cam_net"].options["method"]["background_threshold"] == 0.4
    with pytest.raises(KeyError, match="stage 'cam_net': 'train.stepz'"):
        load_stages("configs/irn/voc.yaml", ["stages.cam_net.train.stepz=1"])


def child_of(toy, stages):
    child = toy.folder / "child.yaml"
    child.write_text(yaml.safe_dump({"base": str(toy.config), "stages": stages}))
    return child


def test_file_changes_adds_and_removes_stages_by_name(toy):
    twin = {"like": "second", "before": "${work_dir}/third"}
    child = child_of(toy, {"second": {"value": 9}, "apart": None, "twin": twin})
    stages = {stage.name: stage.options for stage in load_stages(child)}
    assert list(stages) == ["first", "second", "third", "twin"]
    assert stages["second"]["value"] == stages["twin"]["value"] == 9
    assert stages["twin"]["before"] == f"{toy.run_folder}/third"
    changed = {stage.name: stage.options for stage in load_stages(child, ["stages.second.value=5"])}
    assert changed["second"]["value"] == changed["twin"]["value"] == 5
    with pytest.raises(KeyError, match="stage 'secnd'"):
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
        for key, value in leaves({k: v for k, v in said[stage].items() if k not in (*STAGE_KEYS, "like")}):
            assert dict(leaves(options))[key] == value, (stage, key)
    assert stages["cam_cda"]["model_path"].endswith("/cam_net_cda/last.pth")
    assert stages["cam_cda"]["size"] == 320
    assert stages["cam_net_cda"]["train"]["steps"] == 6610 and stages["cam_net"]["train"]["steps"] == 7
    assert stages["cam_net_cda"]["train"]["batch_size"] == 4
    assert stages["segment_cda"]["data"]["label_dir"].endswith("/pseudo_cda")
    assert (stages["infer"]["crf"], stages["infer_cda"]["crf"]) == ("toco", "seco")


NETWORKS = {}
PIPELINES = [
    str(path.relative_to(ROOT))
    for method in ("irn", "psa", "seam")
    for configs in (CONFIGS, ROOT / "bench/configs")
    for path in sorted((configs / method).glob("*.yaml"))
    if path.stem not in ("cam_net", "affinity")  # the trainings inside
    and not path.with_name(f"{path.stem}_cda.yaml").exists()  # which has all of its stages too
]


@pytest.mark.parametrize("name", PIPELINES)
def test_stages_of_a_shipped_pipeline_fit_their_tools(name, monkeypatch):
    """Every option exists, every folder that is read was written before, every network can be built."""
    built = []

    def record(cfg, *arguments, **options):  # pipelines share their networks
        key = json.dumps([to_plain(cfg)["method"], *arguments, options])
        if key not in NETWORKS:  # none computes; IRN's constructor does
            with torch.device("cpu" if cfg.method.target.endswith("IRNet") else "meta"):
                NETWORKS[key] = build_method(cfg, *arguments, **options)
        built.append(NETWORKS[key])
        return built[-1]

    monkeypatch.setattr("engine.checks.build_method", record)
    images = Split(
        "train", ("background", *"abcdefghijklmnopqrst"), (Record("x", Path("x.jpg"), None, (1,)),)
    )
    monkeypatch.setattr(planning, "load_split", lambda data, name: images)
    monkeypatch.setattr(planning, "_check_exists", lambda key, path: None)
    plans = make_plans(name)
    labels = [str(plan.inputs["data.label_dir"]) for plan in plans if "data.label_dir" in plan.inputs]
    assert any(folder.endswith("/pseudo") for folder in labels) and len(built) >= len(labels)
    for plan in plans:  # the second round knows the first one by its objects alone
        if plan.name.endswith("_cda"):
            text = " ".join(map(str, plan.inputs.values()))
            read = re.findall(rf"{re.escape(str(plan.folder.parent))}/(\w+)", text)
            assert all(stage.endswith("_cda") or stage == "objects" for stage in read), plan.name


def plans_of(*overrides, config="configs/seam/demo.yaml"):
    return {plan.name: plan for plan in make_plans(config, overrides)}


def test_change_of_the_inference_repeats_the_inference_and_no_training(demo_folder):  # noqa: F811
    root = f"data.root={demo_folder}"
    before, after = plans_of(root), plans_of(root, "infer.scales=[1.0,1.5]", "infer.resample=bicubic")
    assert [name for name in before if before[name].settings != after[name].settings] == ["infer", "shuffled"]
    options = after["infer"].options.overrides
    assert {"infer.scales=[1.0, 1.5]", "infer.resample=bicubic"} <= set(options)
    segment = after["segment"].options
    changed = override_config(before["segment"].options, options)
    assert to_plain(changed)["infer"] == to_plain(segment)["infer"]


def test_overrides_of_a_stage_reach_its_tool_and_count(demo_folder):  # noqa: F811
    root = f"data.root={demo_folder}"
    changes = [], ["stages.pseudo.overrides=[method.beta=3]"]
    plain, changed = (plans_of(root, *change)["pseudo"] for change in changes)
    assert changed.options.overrides == [root, "method.beta=3"]
    assert changed.settings == plain.settings | {"overrides": ["method.beta=3"]}
    with pytest.raises(ValueError, match="overrides"):
        plans_of(root, "stages.pseudo.overrides=method.beta=3")


@pytest.fixture(scope="module", autouse=True)
def no_loader_processes():
    """Stages decode their few images themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.loader.core_count", lambda: 0)
        yield


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


def test_whole_pipeline_runs(odd_images, tmp_path, monkeypatch, capsys):
    """By the command line of a single training, on images without tags and with all of them."""
    run, config = tmp_path / "run", "configs/seam/demo.yaml"
    arguments = [f"config={config}", f"work_dir={run}", "stages.seeds.processes=0", *small(odd_images)]
    monkeypatch.setattr(sys, "argv", ["train_voc.py", *arguments])
    main(default_config="configs/toco/voc.yaml", doc="")
    assert_complete(run, config, [], rounds=1)
    assert "seg/test_shuffled/ss+flip" in (run / "table.txt").read_text()
    capsys.readouterr()

    # A key that does not change what is computed runs nothing again.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("last.pth")}
    sys.argv.append("train.log_every=7")
    main(default_config="configs/toco/voc.yaml", doc="")
    assert capsys.readouterr().out.count("unchanged") >= len(load_stages(config))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("last.pth")} == before


def assert_complete(run, config, arguments, rounds):
    """Every stage has left a picture and every round its scores."""
    stages = {stage.name for stage in load_stages(config, arguments)}
    assert {path.parent.parent.name for path in run.glob("*/seen/*.json")} == stages
    assert (run / "report.html").is_file()
    table = (run / "table.txt").read_text()
    for protocol in ("cam/train/", "pseudo/train/walk", "seg/test/ss+flip"):
        assert table.count(protocol) >= rounds


def test_pipeline_runs_on_own_images_without_masks(tmp_path):
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
    pipeline.run("configs/psa/custom.yaml", arguments)
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


TESTS = "shuffled", "cam_test", "cam_shuffled"


def without(*stages):
    return [f"stages.{stage}=null" for stage in stages]


@pytest.fixture(scope="module")
def finished_pipeline(odd_images, tmp_path_factory):
    """Arguments of a finished run of two rounds, and all its pseudo labels."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = [
        f"work_dir={folder}", "stages.seeds.processes=0", "stages.objects.min_share=0.0",
        "stages.objects.max_share=1.0", *small(odd_images), "train.steps=3", *without(*TESTS),
        *without(*(f"{stage}_cda" for stage in TESTS)),
    ]  # fmt: skip
    pipeline.run("configs/irn/demo_cda.yaml", arguments)
    return folder, arguments, pseudo_labels(folder)


def pseudo_labels(folder):
    files = [path for path in folder.glob("pseudo*/*.png") if "_old_" not in path.parent.name]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def test_two_rounds_run(finished_pipeline):
    folder, arguments, labels = finished_pipeline
    assert_complete(folder, "configs/irn/demo_cda.yaml", arguments, rounds=2)
    assert "objects " in (folder / "cam_net_cda" / "run.log").read_text()
    assert len(labels) == 8


def test_pipeline_that_was_killed_ends_with_the_same_pseudo_labels(finished_pipeline):
    """In the middle of a training, and of a walk; stages before it stay as they are.

    So they do when the folder of the run gets another name in between.
    """
    folder, arguments, expected = finished_pipeline
    arguments = [*arguments, *without("segment_cda", "infer_cda")]
    stamps = {path: path.read_bytes() for path in folder.glob("*/stage.json")}
    for stage in ("cam_net_cda", "pseudo_cda"):
        shutil.rmtree(folder / stage)
    for stage in ("cam_net_cda", "pseudo_cda"):
        killed = start(run_until_the_first_output, stage, arguments)
        killed.join(TIMEOUT)
        assert killed.exitcode == -signal.SIGKILL
        outputs = [p for p in (folder / stage).rglob("*") if p.suffix in (".pth", ".npz", ".png")]
        assert len(outputs) == 1
        assert json.loads((folder / stage / "stage.json").read_text())["run"] is None
    moved = folder.with_name("moved")
    folder.rename(moved)
    pipeline.run("configs/irn/demo_cda.yaml", [f"work_dir={moved}", *arguments[1:]])
    moved.rename(folder)
    assert pseudo_labels(folder) == expected
    first_round = [path for path in stamps if not path.parent.name.endswith("_cda")]
    assert len(first_round) >= 8 and all(path.read_bytes() == stamps[path] for path in first_round)


@pytest.mark.parametrize("config", ["toco/demo.yaml", "ws_fcn/demo.yaml"])
def test_single_stage_methods_train_with_pasted_objects(config, finished_pipeline, odd_images, tmp_path):
    """The bank of a pipeline plugs into every method by one key; half of a batch are originals."""
    bank = finished_pipeline[0] / "objects"
    overrides = [f"work_dir={tmp_path / 'run'}", f"data.context_decoupling.bank={bank}", *small(odd_images)]
    overrides.append("data.val_set=null")
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
    arguments += ["train.steps=3", *without("shuffled", "segment", "infer")]
    in_a_group(run_as_a_process, "configs/irn/demo.yaml", arguments)
    alone, shared = (
        np.stack([read_mask(path) for path in sorted((folder / "pseudo").glob("*.png"))])
        for folder in (finished_pipeline[0], tmp_path / "run")
    )
    assert alone.shape == shared.shape and (alone == shared).mean() > 0.98
    assert "pseudo/train/walk" in (tmp_path / "run" / "table.txt").read_text()


def test_two_processes_do_every_stage_once(toy):
    """A stage that does not share its work out runs in the main process; the other one waits."""
    in_a_group(run_toy_as_a_process, toy.folder, toy.config)
    assert [line.split() for line in toy.diary.read_text().splitlines()] == [
        [stage["name"], str(stage["value"]), "0"] for stage in STAGES
    ]
    stamps = {name: json.loads((toy.run_folder / name / "stage.json").read_text()) for name in ALL}
    assert all(stamp["run"] for stamp in stamps.values())
