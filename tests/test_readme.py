"""Every command of the README runs, on small data in place of the paths that it names; those of docs/ as far
as they are Python. Of launchers, what they start runs, in this process.
"""

import os
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.voc import CLASS_NAMES
from engine.config.load import load_config, to_plain
from engine.method import build_method
from tests.checkpoints import demo_folder  # noqa: F401
from tests.processes import launch
from tests.stages import call
from tools import infer_cam
from utils.image import write_mask
from utils.weights import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL_RUN = [
    "train.steps=1", "train.batch_size=2", "train.eval_every=100", "data.num_workers=0", "data.crop_size=32",
    "method.local_crop_size=16", "method.backbone.name=vit_demo", "method.backbone.pretrained=null",
    "device=cpu",
]  # fmt: skip
# Not run here: the suite itself, the demo (tests/test_demo.py), and what fetches or unpacks somebody else's
# archive.
ELSEWHERE = (
    "bash run_demo.sh", "python scripts/demo.py", "bash run_tests.sh", "mkdir ", "python3 -m venv ",
    "source ", "tar ", "unzip ", "pip ", "tensorboard ", "git ",
)  # fmt: skip
# Tests of their own run these, on folders that they make.
OWN_TESTS = (
    "bench/run.py",
    "bench/cooccurrence.py",
    "bench/mutate.py",
    "tools/crf.py",
    "tools/diagnose.py",
    "tools/mine_objects.py",
    "tools/refine_labels.py",
    "tools/report.py",
    "tools/runs.py",
    "tools/exchange_cams.py",
    "tools/convert_data.py",
    "tools/export.py",
    "tools/voc_submission.py",
    "tools/app.py",
)


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for block in blocks for line in block.splitlines()]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


README = commands(ROOT / "README.md")
# The launchers of docs/ are those of the README with other arguments.
DOCS = [c for page in PAGES[1:] for c in commands(page) if c.startswith("python ") and "..." not in c]
ALL = [c for c in dict.fromkeys([*README, *DOCS]) if not c.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, demo_folder):  # noqa: F811
    """What the commands find: data in VOC layout, own images, a photo, and trained runs of 21 and 81
    classes.
    """
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
    image.save(root / "photo.jpg")
    custom, voc = root / "custom", root / "voc"
    for folder in ("custom/images", "voc/JPEGImages", "voc/ImageSets/Segmentation", "labels"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        image.save(custom / "images" / f"{name}.jpg")
        image.save(voc / "JPEGImages" / f"{name}.jpg")
        for folder in (voc / "SegmentationClassAug", root / "labels"):
            write_mask(folder / f"{name}.png", rng.integers(0, 2, (40, 48), dtype=np.uint8))
    for split in ("train", "val", "test", "val_part", "all"):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("a\nb\nc\n")
    (custom / "tags.csv").write_text("name,tags\na,dog\nb,dog;person\nc,\n")
    (voc / "tags.csv").write_text("name,tags\na,aeroplane\nb,aeroplane\nc,aeroplane\n")
    (root / "my_names.txt").write_text("a\nb\n")
    runs = {}
    for number in (21, 81):
        names = [*CLASS_NAMES, *(f"class{k}" for k in range(21, 81))][:number]
        cfg = load_config("configs/toco/voc.yaml", [
            f"data.root={voc}", f"data.options.class_names=[{','.join(names)}]", "eval.size=32",
            "infer.scales=[1.0]", "method.cam_scales=[1.0]",
            "method.backbone={name: vit_demo, width: 32, depth: 4, heads: 2, pretrained: null}",
        ])  # fmt: skip
        method = build_method(cfg, number)
        state = {"model": method.state_dict(), "config": to_plain(cfg), "class_names": names, "step": 1}
        runs[number] = root / f"run{number}" / "last.pth"
        save_checkpoint(runs[number], state)
    return {"root": root, "custom": custom, "voc": voc, "demo": demo_folder, "runs": runs, "ran": set()}


def adapted(command: str, world: dict, out: Path) -> list[str] | None:
    """The command with the paths of a user replaced by those of the test; None when nothing of it can run
    here.
    """
    # NNODES=2 ... of a second machine stand before the command.
    words = [word for word in shlex.split(command) if not re.match(r"^[A-Z_]+=\S+$", word)]
    if words[0] == "bash":
        words = started_by(words, out)
    script = next((word for word in words if word.startswith(("scripts/", "tools/", "bench/"))), "")
    if "prepare_" in script or script in OWN_TESTS:
        return None  # tests of their own run them
    if script.startswith("scripts/train_") and "--help" not in words:
        data = [f"data.root={world['demo']}", "data.val_set=null"]
        config = "config=configs/toco/demo.yaml"
        if "custom" in script:
            data[0], config = f"data.root={world['custom']}", "config=configs/toco/custom.yaml"
        kept = [w for w in words if not w.startswith(("data.", "config=", "train.", "run_name=", "stages."))]
        return [*kept, config, *data, *SMALL_RUN, f"work_dir={out / 'run'}"]
    if script == "tools/check_data.py":
        return [*(w for w in words if not w.startswith("data.root=")), f"data.root={world['custom']}"]
    trained = str(world["runs"][81 if "coco" in script else 21])
    known = {"photo.jpg": world["root"] / "photo.jpg", "my_names.txt": world["root"] / "my_names.txt"}
    known["~/.infer_seg"] = out / "completion"
    known |= {f"data/custom/{name}": world["custom"] / name for name in ("images", "tags.csv")}
    words = [trained if w.endswith(".pth") else str(known.get(w, w)) for w in words]
    if script == "tools/evaluate.py":
        return _evaluation(words, world, out)
    if "--out" in words:
        words[words.index("--out") + 1] = str(out / "out")
    elif "--help" not in words:
        words += ["--out", str(out / "out")]
    return words


def _evaluation(words: list[str], world: dict, out: Path) -> list[str]:
    """tools/evaluate.py reads folders that other commands wrote."""
    if "--labels" in words:
        words[words.index("--labels") + 1] = str(world["root"] / "labels")
        return [*words, f"data.root={world['voc']}"]
    folder = out / "cam"
    options = {"model_path": world["runs"][21], "infer": "train", "out": folder, "device": "cpu"}
    call(infer_cam, options)
    words[words.index("--cam") + 1] = str(folder)
    return words


def started_by(words: list[str], folder: Path) -> list[str]:
    """The script that a launcher starts, in one process on the CPU (tests/test_launch.py starts several)."""
    done, started = launch(words, folder, cwd=ROOT)
    assert started, done.stderr
    arguments = ["--device=cpu" if word == "--device=cuda" else word for word in started.arguments]
    return ["python", os.path.relpath(started.script, ROOT), *arguments]


@pytest.mark.parametrize("command", ALL)
def test_command_runs(command, world, tmp_path, monkeypatch):
    words = adapted(command, world, tmp_path)
    if words is None:
        assert list(ROOT.glob(f"tests/*/test_{Path(shlex.split(command)[1]).stem}.py"))
        return
    same = tuple(word.replace(str(tmp_path), "") for word in words)
    if same not in world["ran"]:  # with the paths of the test many commands are one
        run_here(words, monkeypatch)
        world["ran"].add(same)


def run_here(words, monkeypatch):
    assert words[0] == "python"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr("datasets.loader.core_count", lambda: 0)  # tests/datasets starts workers
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as end:
        assert end.code in (None, 0), words


def test_the_method_of_the_readme_trains(world, tmp_path, monkeypatch):
    """Its code and its config as they stand there, but for the backbone and the data."""
    text = (ROOT / "README.md").read_text()
    code, config = (
        textwrap.dedent(re.search(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)[1])
        for kind in ("python", "yaml")
    )
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(config.replace("methods.mine.Mine", "mine.Mine"))
    small = [word for word in SMALL_RUN if "local_crop" not in word]
    data = [f"data.root={world['voc']}", "data.train_set=train", "data.val_set=null"]
    command = ["python", "scripts/train_voc.py", f"config={tmp_path / 'mine.yaml'}", *data, *small]
    monkeypatch.syspath_prepend(tmp_path)
    run_here([*command, "train.steps=2", f"work_dir={tmp_path / 'run'}"], monkeypatch)
    assert (tmp_path / "run" / "last.pth").is_file()


def test_pages_name_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
