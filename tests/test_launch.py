"""Launchers, several processes, kills and resumes, bad command lines."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets.demo.scene import SceneOptions
from datasets.demo.write import write_dataset
from engine.config.load import load_config
from engine.train import run as train
from engine.trainer import Trainer
from scripts.launch import main
from tests.processes import TIMEOUT, free_port, in_a_group, launch, start
from utils.distributed import world_size
from utils.image import read_mask, write_mask
from utils.weights import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Arguments of a short run: few images, a small network, every loss of ToCo switched on from the first
    step.
    """
    root = tmp_path_factory.mktemp("demo")
    write_dataset(root, SceneOptions(train=24, test=2, image_size=48), workers=1)
    # Adam divides by the gradient's size: without the floor, noise of tiny gradients becomes full steps.
    text = """
        data.crop_size=48 data.num_workers=0 eval.size=48 train.steps=4 train.batch_size=4 train.threads=1
        train.log_every=1 train.checkpoint_every=2 train.eval_every=100 method.backbone.width=32
        method.backbone.depth=4 method.backbone.heads=2 method.local_crop_size=16 device=cpu
        method.loss_weights.seg=0.1 method.loss_weights.reg=0.05 method.loss_weights.ptc=0.2
        method.loss_weights.ctc=0.5 optim.warmup_steps=0 optim.eps=1e-4
    """
    return ["config=configs/toco/demo.yaml", f"data.root={root}", *text.split()]


def run(command, **environment):
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def go_on(demo, folder):
    """The command again, in this process: starting one takes longer than the steps."""
    train(load_config("configs/toco/demo.yaml", [*demo[1:], f"work_dir={folder}"]))


def result(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = torch.tensor([list(line["loss"].values()) for line in lines if "loss" in line])
    return losses, load_checkpoint(folder / "last.pth")["model"]


@pytest.fixture(scope="module")
def plain(demo, tmp_path_factory):
    """The run of one process without a launcher, that the others are compared with."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    go_on(demo, folder)
    return folder


def assert_same_run(folder, plain, tolerance=1e-5):
    (losses, weights), (expected_losses, expected) = result(folder), result(plain)
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights, expected, rtol=tolerance, atol=tolerance)


def test_a_run_leaves_a_report(plain):
    """Written after the validation of the last step, with what it saw and no warning."""
    assert "toco" in (plain / "report.html").read_text().lower()
    assert json.loads((plain / "seen" / "test.json").read_text())["step"] == 4
    assert "warning" not in (plain / "run.log").read_text()


def test_split_of_the_batch_over_processes_does_not_change_the_step(demo, plain, tmp_path):
    in_a_group(one_of_the_processes, demo, tmp_path / "run")
    assert_same_run(tmp_path / "run", plain)


def one_of_the_processes(rank, demo, folder):
    go_on(demo, folder)


def stopped_by_a_signal(rank, demo, folder, alone):
    """After its first step the last process of a group gets the signal, or a process with all its workers."""
    step = Trainer._train_step
    if alone:
        os.setsid()

    def step_and_stop(self, *arguments):
        out = step(self, *arguments)
        if rank == world_size() - 1:
            os.kill(0 if alone else os.getpid(), signal.SIGTERM)
        return out

    Trainer._train_step = step_and_stop
    try:
        go_on([*demo, "train.checkpoint_every=100"], folder)
    except SystemExit as end:
        if alone:
            raise
        return end.code
    return 0


def test_stop_signal_to_one_of_two_processes_saves_and_the_run_goes_on(demo, plain, tmp_path):
    """They stop after the same step."""
    assert in_a_group(stopped_by_a_signal, demo, tmp_path / "run", False) == 2 * [128 + signal.SIGTERM]
    go_on(demo, tmp_path / "run")
    assert_same_run(tmp_path / "run", plain)


def test_stop_signal_to_the_loader_workers_too_saves_and_the_run_goes_on(demo, plain, tmp_path):
    """Ctrl-C and a cluster's stop reach the whole process group."""
    process = start(stopped_by_a_signal, 0, [*demo, "data.num_workers=1"], tmp_path / "run", True)
    process.join(TIMEOUT)
    assert process.exitcode == 128 + signal.SIGTERM
    go_on(demo, tmp_path / "run")
    assert_same_run(tmp_path / "run", plain, tolerance=0)


def test_run_of_another_config_or_start_is_left_alone(demo, plain):
    """And a finished run has nothing left to do."""
    before = (plain / "last.pth").stat().st_mtime_ns
    go_on(demo, plain)
    shutil.copy(plain / "last.pth", plain.parent / "other.pth")
    for change, message in (
        (f"train.resume={plain.parent / 'other.pth'}", "did not start from"),
        ("optim.lr=1.0", r"optim.lr: 0.0005 -> 1.0.*run_name="),
    ):
        with pytest.raises(ValueError, match=message):
            go_on([*demo, change], plain)
    assert (plain / "last.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.root=/nowhere"], "/nowhere"),
        (["device=cuda:7"], "0 found"),
        (["train.batch_size=5", "train.accumulate=2"], "batch_size"),
        (["method.label_source=camm"], "label_source"),
        (["train.resume=no"], "checkpoint"),
        (["method.loss_weights.segg=0.1"], "did you mean 'seg'"),
        (["data.label_dir=logs"], "learns from tags"),
        (["run_name=../elsewhere"], "run_name"),
    ],
)
def test_bad_command_line_gets_one_clear_error(demo, tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["train_voc.py", *demo, f"work_dir={tmp_path}", *arguments])
    with pytest.raises(SystemExit) as end:
        main(default_config="configs/toco/voc.yaml", doc="")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_masks_of_other_classes_end_a_run_before_its_first_step(demo, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(next(item for item in demo if item.startswith("data.root=")).partition("=")[2], root)
    path = sorted((root / "SegmentationClass").glob("test_[0-9]*.png"))[-1]
    write_mask(path, np.full_like(read_mask(path), 9))
    with pytest.raises(ValueError, match=f"{path.name}.*value 9"):
        go_on([*demo, f"data.root={root}"], tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def torchrun(errors, *words):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["torchrun.py", *words]
    runpy.run_path(str(ROOT / "scripts/torchrun.py"), run_name="__main__")


def launched(folder, text, port=None):
    """A running launcher of two processes of a script with this text, and the file of what they say."""
    (folder / "script.py").write_text(text)
    flags = ["--nproc_per_node=2", f"--master_port={port or free_port()}"]
    return start(torchrun, folder / "errors", *flags, str(folder / "script.py")), folder / "errors"


def test_error_of_a_process_is_the_last_word_of_the_launcher(tmp_path):
    """torchrun would add a traceback of its own."""
    process, errors = launched(tmp_path, "import sys; print('what is wrong', file=sys.stderr); sys.exit(2)")
    process.join(TIMEOUT)
    assert process.exitcode == 2 and "what is wrong" in errors.read_text()
    assert "Traceback" not in errors.read_text()


def test_stop_signal_reaches_the_processes_of_the_launcher(tmp_path):
    said = tmp_path / "said"
    process, errors = launched(
        tmp_path,
        f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open({str(said)!r}, "a").write("end "), sys.exit(143)))
open({str(said)!r}, "a").write("on ")
time.sleep({TIMEOUT})
""",
    )
    while not said.is_file() or said.read_text().count("on") < 2:
        time.sleep(0.05)
        assert process.is_alive()
    process.terminate()
    process.join(TIMEOUT)
    assert process.exitcode == 128 + signal.SIGTERM and said.read_text().count("end") == 2
    assert "Traceback" not in errors.read_text()


def test_port_that_is_taken_is_a_clear_error(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        process, errors = launched(tmp_path, "", port)
        process.join(TIMEOUT)
    assert process.exitcode == 2 and port in errors.read_text() and "another PORT" in errors.read_text()
    assert "Traceback" not in errors.read_text()


@pytest.mark.parametrize(
    ("positions", "flags", "arguments", "gpus"),
    [
        ([], {"nproc_per_node": "1", "master_port": "29500"}, [], None),
        (["4"], {"nproc_per_node": "4", "master_port": "29500"}, ["device=cuda"], None),
        (["4", "29501", "0,1,2,3"], {"master_port": "29501"}, ["device=cuda"], "0,1,2,3"),
        (["1", "29501", "5", "mine"], {"nproc_per_node": "1"}, ["run_name=mine", "device=cuda"], "5"),
        (["2", "29501", "cpu", "mine"], {"nproc_per_node": "2"}, ["run_name=mine", "device=cpu"], ""),
    ],
)
def test_positions_of_the_launcher(tmp_path, positions, flags, arguments, gpus):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first"}
    command = ["bash", "run_train.sh", "scripts/train_voc.py", *positions, "train.steps=5"]
    done, started = launch(command, tmp_path, cwd=ROOT, env={**os.environ, **nodes})
    assert started, done.stderr
    assert flags.items() <= started.flags.items()
    assert {"nnodes": "2", "node_rank": "1", "master_addr": "first"}.items() <= started.flags.items()
    assert started.script == "scripts/train_voc.py" and started.gpus == gpus
    assert sorted(started.arguments) == sorted([*arguments, "train.steps=5"])


@pytest.mark.parametrize(
    ("positions", "message", "nodes"),
    [
        (["4", "70000"], "PORT must be", {}),
        (["4", "29501", "0;1;2;3"], "DEVICES must be", {}),
        (["4", "29501", "0,1"], "DEVICES names 2", {}),
        (["4"], "NNODES=2 needs MASTER_ADDR", {"NNODES": "2"}),
        (["4"], "NNODES=2 needs MASTER_ADDR", {"NNODES": "2", "NODE_RANK": "1"}),
    ],
)
def test_bad_positions_of_the_launcher_are_an_error(tmp_path, positions, message, nodes):
    command = ["bash", "run_train.sh", "scripts/train_voc.py", *positions]
    done, started = launch(command, tmp_path, cwd=ROOT, env={"PATH": os.environ["PATH"], **nodes})
    assert done.returncode == 2 and message in done.stderr and started is None


def test_environment_that_lacks_packages_is_an_error(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho timm, tqdm\n")
    python.chmod(0o755)
    for path, lacking in ((python, "timm, tqdm"), (tmp_path / "none", "a Python from 3.10 on that runs")):
        done = run(["bash", "run_train.sh", "scripts/train_voc.py"], PYTHON=str(path))
        assert done.returncode == 2 and f"PYTHON={path} lacks {lacking} (req" in done.stderr


def test_wandb_repeats_what_tensorboard_gets(demo, plain, monkeypatch):
    """With a module of that name in its place."""
    started = []

    def init(**options):
        started.append(options)
        return nullcontext()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    go_on([*demo, "train.wandb=my_project"], plain)
    assert started[0]["project"] == "my_project" and started[0]["sync_tensorboard"]


def test_what_a_python_lacks(tmp_path):
    (tmp_path / "requirements.txt").write_text("# bounds\ntorch>=2.6\npillow>=10.1\nno-such-package>=1.0\n")
    command = ["bash", "-c", f"source {ROOT}/scripts/environment.sh; lacks {sys.executable}"]
    environment = {**ENVIRONMENT, "TEST_MODULES": "pytest no_such_module"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "no_such_module, no-such-package"


def test_torch_may_come_from_an_index_of_its_own(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch>=2.6\ntorchvision>=0.21\nnumpy>=1.26\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "TORCH_INDEX": "INDEX"}
    command = ["bash", "-ec", f"source {ROOT}/scripts/environment.sh; use_python -r requirements.txt"]
    for _ in range(2):  # what is installed stays
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    _, first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.endswith("--index-url INDEX torch>=2.6 torchvision>=0.21")
    assert second.endswith("-r requirements.txt") and "INDEX" not in second


def test_help_shows_what_a_command_would_use(monkeypatch, capsys):
    """Without data."""
    monkeypatch.setattr(sys, "argv", ["scripts/train_voc.py", "--help"])
    runpy.run_path(str(ROOT / "scripts" / "train_voc.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("Train on PASCAL VOC 2012", "usage:", "train.steps = 20000"))
    assert "DEVICES" in run(["bash", "run_train.sh", "--help"]).stdout
