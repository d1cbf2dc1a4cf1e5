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


def test_missing_file_names_its_neighbours(tmp_path):
    save_checkpoint(tmp_path / "best.pth", {})
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*last.pth.*found there: .*best.pth"):
        load_checkpoint(tmp_path / "last.pth")


def test_objects_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        load_checkpoint(tmp_path / "evil.pth")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_checkpoint(tmp_path / name)


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
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "junk.pth").write_text("junk\n")  # an index error inside of torch
    for name in ("empty", "text", "junk"):
        with pytest.raises(ValueError, match=f"{name}.pth is damaged or not a checkpoint"):
            load_checkpoint(tmp_path / f"{name}.pth")
