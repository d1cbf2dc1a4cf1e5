"""Checkpoints are complete or absent, and reading one runs nothing."""

import pickle

import pytest
import torch

from utils.weights import load_checkpoint, rename_keys, save_checkpoint


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"step": lambda: 2})
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_first_matching_rule_renames():
    state = {"module.encoder.x": torch.zeros(1), "module.y": torch.zeros(1)}
    assert set(rename_keys(state, [(r"^module\.encoder\.", "backbone."), (r"^module\.", "")])) == {
        "backbone.x",
        "y",
    }


def test_other_contents_are_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="a Tensor, not a mapping"):
        load_checkpoint(tmp_path / "tensor.pth")
    for suffix in ("pth", "safetensors"):
        # The second one is an index error inside of torch.
        for content in (b"", b"junk\n", b"not a checkpoint", b"PK\x03\x04 not a checkpoint"):
            (tmp_path / f"a.{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=rf"a\.{suffix} is damaged or not a checkpoint"):
                load_checkpoint(tmp_path / f"a.{suffix}")
