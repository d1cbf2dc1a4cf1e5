"""Exported files compute what the checkpoint computes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.export import Dim

import engine.graph
from engine.checkpoint import Checkpoint, restore_state
from engine.config.load import load_config, to_plain
from engine.graph import Graph
from engine.inference import load_method
from engine.method import build_method
from engine.predictor import tag2mask
from methods.ws_fcn import FlowAlignment
from tests.stages import call
from tools import export
from utils.weights import load_checkpoint, save_checkpoint

PAGE = Path(__file__).resolve().parents[2] / "docs" / "use.md"


@pytest.fixture(scope="module")
def seco(tmp_path_factory):
    """A checkpoint of SeCo, which remembers more than the others."""
    small = "{name: vit_demo, width: 16, depth: 1, heads: 1, aux_layer: -1, pretrained: null}"
    cfg = load_config("configs/seco/demo.yaml", [f"method.backbone={small}", "eval.size=48"])
    method = build_method(cfg, 3)
    path = tmp_path_factory.mktemp("seco") / "last.pth"
    names = ["background", "cat", "dog"]
    state = {"model": method.state_dict(), "config": to_plain(cfg), "class_names": names, "step": 10**6}
    save_checkpoint(path, {**state, "optimizer": {}})
    return path


@pytest.fixture(scope="module")
def programs():
    """The program of torch.export, once it is made: that takes longest."""
    return []


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch, programs):
    trace = engine.graph.exported

    def first(graph):
        if not programs:
            programs.append(trace(graph))
        return programs[0]

    monkeypatch.setattr("engine.graph.exported", first)


def test_weights_alone_are_a_checkpoint(seco, tmp_path):
    out = call(export, {"model_path": seco, "out": tmp_path / "model.safetensors"})
    assert not [key for key in load_file(out) if re.search("teacher|queue|prototype|proj_head", key)]
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    ours, theirs = (tag2mask(path).predict(photo) for path in (seco, out))
    np.testing.assert_array_equal(ours.label, theirs.label)
    assert ours.score == theirs.score and ours.names == theirs.names and ours.protocol == theirs.protocol
    state = load_checkpoint(out)
    assert state["step"] == 10**6 and "optimizer" not in state
    method = load_method(seco, "cpu").method
    student, teacher = method.backbone.state_dict(), method.teacher_backbone.state_dict()
    teacher["pos_embed"].fill_(torch.nan)
    optimizer = torch.optim.SGD(method.parameters())
    restore_state(Checkpoint(out, state), method, optimizer, {}, torch.device("cpu"), "seg")
    assert torch.equal(teacher["pos_embed"], student["pos_embed"])  # a training begins with it


def test_no_prediction_reads_what_only_training_needs(seco):
    method = load_method(seco, "cpu").method
    image = torch.randn(1, 3, 48, 48)
    before = method.predict(image, (1.0,))
    for key, value in method.state_dict().items():
        if key.startswith(method.training_only) and value.is_floating_point():
            value.fill_(torch.nan)
    after = method.predict(image, (1.0,))
    for name in ("cam", "aux_cam", "class_logits", "seg_logits"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_program_takes_other_sizes(seco, tmp_path):
    out = call(export, {"model_path": seco, "out": tmp_path / "model.pt2"})
    program, graph = torch.export.load(out).module(), Graph(load_method(seco, "cpu"))
    for a, b in zip(program(graph.sample(1, 3, 5)), graph(graph.sample(1, 3, 5)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(FileExistsError):
        call(export, {"model_path": seco, "out": out})


def test_ws_fcn_is_exported_for_any_size():
    """Its alignment, whose grid depends on the size."""
    torch.manual_seed(0)
    block, h, w = FlowAlignment(4, 6), Dim("h", min=3), Dim("w", min=3)
    sizes = ({2: 2 * h, 3: 2 * w}, {2: h, 3: w})
    inputs = torch.randn(2, 4, 12, 10), torch.randn(2, 6, 6, 5)
    program = torch.export.export(block, inputs, dynamic_shapes=sizes).module()
    inputs = torch.randn(2, 4, 8, 14), torch.randn(2, 6, 4, 7)
    torch.testing.assert_close(program(*inputs), block(*inputs))


def test_example_of_the_page_runs_onnx(seco, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation, as of a phone held upright
    Image.effect_noise((61, 43), 80).convert("RGB").save("photo.jpg", exif=turned)
    call(export, {"model_path": seco, "out": "model.onnx"})
    (example,) = re.findall(r"```python\n(import numpy.*?)```", PAGE.read_text(), flags=re.DOTALL)
    values = {}
    exec(example, values)
    graph = Graph(load_method(seco, "cpu"))
    expected = graph(torch.from_numpy(values["image"].copy()))
    for a, name in zip(expected, ("class_logits", "cam", "mask"), strict=True):
        np.testing.assert_allclose(a.numpy(), values[name], atol=1e-4)
    assert Image.open("mask.png").size == (43, 61) and values["names"] == ["background", "cat", "dog"]
