"""Published checkpoints become ours."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from engine.inference import load_method
from methods.toco import ToCo
from tests.formula import Formula
from tests.methods.authors import author_state
from tools import convert_weights


@pytest.fixture
def published(tmp_path):
    method = ToCo(21, {"name": "deit_tiny_patch16_224"}).eval()
    state = author_state(method, Formula())
    state["module.encoder.head.bias"] = torch.zeros(1000)
    method.load_state_dict({own: value for own, value in zip(method.state_dict(), state.values())})
    torch.save(state, tmp_path / "theirs.pth")
    return method, tmp_path / "theirs.pth"


@pytest.mark.parametrize("target", ["methods.vit_base.SingleStageViT", "methods.toco.ToCo"])
def test_converted_checkpoint_computes_the_same(published, tmp_path, capsys, target):
    method, path = published
    out = tmp_path / "ours.pth"
    convert_weights.run({"model_path": path, "out": out, "overrides": [f"method.target={target}"]})
    printed = capsys.readouterr().out
    assert "encoder.head.bias" in printed
    assert ("not needed for inference: proj_head_t.mlp.4.bias" in printed) == ("vit_base" in target)
    ours = load_method(out, "cpu")
    assert type(ours.method).__name__ == target.split(".")[-1] and len(ours.class_names) == 21
    image = torch.randn(1, 3, 64, 80)
    assert_close(ours.method.segment(image), method.segment(image))


def test_weights_alone(published, tmp_path):
    out = convert_weights.run({"model_path": published[1], "out": tmp_path / "ours.safetensors"})
    assert_close(load_file(out)["classifier.weight"], published[0].classifier.weight.detach())


def test_bad_arguments_are_errors(published, tmp_path):
    path = published[1]
    with pytest.raises(ValueError, match="neither in"):
        convert_weights.run({"model_path": path, "out": "x.bin"})
    with pytest.raises(FileExistsError, match="choose another"):
        convert_weights.run({"model_path": path, "out": path})
