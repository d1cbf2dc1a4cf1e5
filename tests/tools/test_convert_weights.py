"""Published checkpoints become ours."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from engine.inference import load_method
from methods.cam import PooledCAMNetwork
from methods.toco import ToCo
from models.backbones import create_backbone
from models.backbones.resnet38d import MXNET_CLASSIFIER, MXNET_NAMES
from tests.conftest import GOLDEN
from tests.formula import Formula
from tests.methods.authors import author_state
from tests.mxnet import write_params
from tests.stages import call
from tools import convert_weights
from utils.weights import rename_keys


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "theirs.pth"
    method = ToCo(21, {"name": "deit_tiny_patch16_224"}).eval()
    state = author_state(method, Formula())
    state["module.encoder.head.bias"] = torch.zeros(1000)
    method.load_state_dict({own: value for own, value in zip(method.state_dict(), state.values())})
    torch.save(state, path)
    return method, path


@pytest.mark.parametrize("target", ["methods.vit_base.SingleStageViT", "methods.toco.ToCo"])
def test_converted_checkpoint_computes_the_same(published, tmp_path, capsys, target):
    method, path = published
    out = tmp_path / "ours.pth"
    call(convert_weights, {"model_path": path, "out": out, "overrides": [f"method.target={target}"]})
    printed = capsys.readouterr().out
    assert "encoder.head.bias" in printed
    assert ("not needed for inference: proj_head_t.mlp.4.bias" in printed) == ("vit_base" in target)
    ours = load_method(out, "cpu")
    assert type(ours.method).__name__ == target.split(".")[-1] and len(ours.class_names) == 21
    image = torch.randn(1, 3, 64, 80)
    assert_close(ours.method.predict(image, ()).seg_logits, method.predict(image, ()).seg_logits)


def test_weights_alone(published, tmp_path):
    out = call(convert_weights, {"model_path": published[1], "out": tmp_path / "ours.safetensors"})
    assert_close(load_file(out)["classifier.weight"], published[0].classifier.weight.detach())


def test_bad_arguments_are_errors(published, tmp_path):
    path = published[1]
    with pytest.raises(ValueError, match="must end in"):
        call(convert_weights, {"model_path": path, "out": "x.bin"})
    with pytest.raises(FileExistsError, match="choose another"):
        call(convert_weights, {"model_path": path, "out": path})


def test_published_cam_network_computes_the_same_after_conversion(tmp_path):
    torch.manual_seed(0)
    method = PooledCAMNetwork(4, {"name": "resnet50"}, cam_size="stride16").eval()
    state = {
        key.replace("backbone.", "resnet50.", 1): value.detach().clone()
        for key, value in method.state_dict().items()
    }
    listed = json.loads((GOLDEN / "state_dict_irn_cam.json").read_text())["aliases"]
    torch.save(state | {alias: state[key] for alias, key in listed.items()}, tmp_path / "theirs.pth")
    out = call(convert_weights, {"model_path": tmp_path / "theirs.pth", "out": tmp_path / "ours.pth"})
    ours = load_method(out, "cpu")
    assert isinstance(ours.method, PooledCAMNetwork) and len(ours.class_names) == 4
    image = torch.randn(1, 3, 37, 50)
    assert_close(ours.method.predict(image, (1.0,)).cam, method.predict(image, (1.0,)).cam)


# -- MXNet's ResNet-38d


def mxnet_names():
    """MXNet's name -> the published one, recorded from the authors' converter; and the names it drops."""
    recorded = json.loads((GOLDEN / "resnet38d_mxnet_names.json").read_text())
    return recorded["map"], recorded["dropped"]


def test_mxnet_names_match_reference_values():
    names, dropped = mxnet_names()
    assert rename_keys({name: name for name in names}, MXNET_NAMES) == {
        ours: name for name, ours in names.items()
    }
    assert all(name.startswith(MXNET_CLASSIFIER) for name in dropped)
    assert not any(name.startswith(MXNET_CLASSIFIER) for name in names)


@pytest.fixture
def mxnet_file(tmp_path):
    """A narrow ResNet-38d and its file in MXNet's format."""
    source = create_backbone("resnet38d", width=2)
    names, dropped = mxnet_names()
    own = source.state_dict()
    arrays = {name: own[ours].numpy() for name, ours in names.items()}
    arrays |= {name: torch.zeros(3, 2).numpy() for name in dropped}
    write_params(tmp_path / "net.params", arrays)
    return source, tmp_path / "net.params", arrays


def test_weights_of_mxnet_become_pretrained_weights(mxnet_file, tmp_path, capsys):
    source, path, _ = mxnet_file
    out = call(convert_weights, {"model_path": path, "out": tmp_path / "weights" / "net.safetensors"})
    assert "not used: arg:linear1000_bias" in capsys.readouterr().out
    loaded = create_backbone("resnet38d", width=2, pretrained=out)
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_mxnet_files_of_other_networks_are_refused(mxnet_file, tmp_path):
    _, path, arrays = mxnet_file
    out = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="--out cannot be .*x.pth"):
        call(convert_weights, {"model_path": path, "out": tmp_path / "x.pth"})
    with pytest.raises(ValueError, match="method.a=1"):
        call(convert_weights, {"model_path": path, "out": out, "overrides": ["method.a=1"]})
    del arrays["arg:res4b3_branch2a_weight"]
    write_params(path, arrays)
    with pytest.raises(ValueError, match=r"b4_3\.conv_branch2a\.weight is missing"):
        call(convert_weights, {"model_path": path, "out": out})
    assert not out.exists()
