"""Files of strangers run nothing, fill no memory, and write nothing into a terminal but text."""

import io
import logging
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.voc import tags_from_xml
from engine.config.load import load_config
from engine.data import load_split
from engine.method import build_method
from engine.segmentation import inference_refiner
from utils.cam_files import load_cam
from utils.cli import run_main
from utils.image import read_image, read_mask
from utils.logging import LOGGER, setup_logging
from utils.npy_dictionary import read_npy_dictionary
from utils.weights import load_checkpoint

SLIPPED = []


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return SLIPPED.append, ("pickle",)


def slip(*_, **options):
    """A function that a config may name, and that must not be called."""
    SLIPPED.append(options)


@pytest.fixture(autouse=True)
def nothing_ran():
    yield
    assert not SLIPPED


def test_checkpoints_and_arrays_run_nothing(tmp_path):
    torch.save({"model": Code()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Code()))
    np.savez(tmp_path / "a.npz", cam=np.array([Code()], dtype=object), class_ids=[0], size=[1, 1])
    np.save(tmp_path / "a.npy", {"a": Code()})
    for read, name in (
        (load_checkpoint, "a.pth"),
        (load_checkpoint, "b.pth"),
        (load_cam, "a.npz"),
        (read_npy_dictionary, "a.npy"),
    ):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("build", "spec", "term"),
    [
        (lambda spec: build_method({"method": spec}, 3), {"target": f"{__name__}.slip"}, "no Method"),
        (lambda spec: build_method({"method": spec}, 3), {"target": "torch.nn.Linear"}, "no Method"),
        (inference_refiner, {"name": f"{__name__}.slip", "command": "ls"}, "no refiner"),
        (
            lambda spec: build_method({"method": spec}, 3),
            {"target": "methods.cam.CAMNetwork", "backbone": {"name": f"{__name__}.slip", "command": "ls"}},
            "no Module",
        ),
        (
            lambda spec: load_split(spec, "train"),
            {"source": f"{__name__}.slip", "root": "x", "options": {"command": "ls"}},
            "data.source",
        ),
    ],
)
def test_the_config_inside_a_checkpoint_calls_no_function(build, spec, term):
    with pytest.raises(ValueError, match=term):
        build(spec)


def test_yaml_tags_run_nothing(tmp_path):
    for tag in (f"!!python/object/apply:{__name__}.slip []", f"!!python/name:{__name__}.slip"):
        (tmp_path / "a.yaml").write_text(f"base: toco/voc.yaml\nrun_name: {tag}\n")
        with pytest.raises(ValueError, match=r"a\.yaml"):
            load_config(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="tag"):
        load_config("configs/toco/voc.yaml", [f"train.steps=!!python/object/apply:{__name__}.slip []"])


def test_xml_entities_neither_grow_nor_read_files(tmp_path):
    (tmp_path / "secret").write_text("cat")
    levels = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 10}">' for k in range(1, 10))
    for name, dtd, text in (
        ("bomb", f'<!ENTITY e0 "cat">{levels}', "&e9;"),
        ("file", f'<!ENTITY x SYSTEM "file://{tmp_path}/secret">', "&x;"),
    ):
        xml = f"<!DOCTYPE a [{dtd}]><annotation><object><name>{text}</name></object></annotation>"
        (tmp_path / f"{name}.xml").write_text(xml)
        with pytest.raises(ValueError, match=name):
            tags_from_xml(tmp_path, [name])


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_image_bombs_are_refused_before_they_are_unpacked(tmp_path):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")))
    tags = [(256, 4, 90000), (257, 4, 90000), (258, 3, 32), (259, 3, 1), (262, 3, 2), (277, 3, 3)]
    tags += [(273, 4, 8), (278, 4, 90000), (279, 4, 16), (339, 3, 3)]  # colours of 32-bit floats
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in sorted(tags)
    )
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(20))
    for read, name in ((read_image, "a.png"), (read_mask, "a.png"), (read_image, "a.tif")):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, monkeypatch):
    name, shown = "a\x1b[2J\x9b\r.png", "a\\x1b[2J\\x9b\\r.png"
    streams = {stream: io.StringIO() for stream in ("stdout", "stderr")}
    for stream, text in streams.items():
        monkeypatch.setattr(sys, stream, text)

    def fail():
        raise ValueError(f"cannot read {name}\nor é")

    with pytest.raises(SystemExit):
        run_main(fail)
    setup_logging(tmp_path)
    LOGGER.log(logging.INFO, f"line {name}")
    LOGGER.handlers.clear()
    assert f"{shown}\nor é" in streams["stderr"].getvalue() and shown in streams["stdout"].getvalue()
    assert shown in (tmp_path / "run.log").read_text("utf-8")
    assert "\x1b" not in "".join(text.getvalue() for text in streams.values())


def test_pictures_of_a_real_size_are_read(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").size == (40, 30)
