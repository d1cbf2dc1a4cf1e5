"""Fixtures of the engine's tests."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from datasets.base import Record, Split, WeakSegDataset
from engine.details import tag_pairs
from engine.scores.records import write_scores
from engine.seen import record_seen
from engine.validation import protocols, validate
from tests.checkpoints import checkpoint, demo_folder, published_toco  # noqa: F401
from utils.image import write_mask
from utils.logging import MetricsWriter


@pytest.fixture
def split(tmp_path):
    """Five noisy photos of different sizes with masks; the last one has no object."""
    rng = np.random.default_rng(0)
    records = []
    for i, size in enumerate([(20, 30), (33, 21), (16, 16), (40, 25), (24, 24)]):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        mask = rng.integers(0, 4, size, dtype=np.uint8)
        mask[:2] = 255
        if i == 4:
            mask[mask != 255] = 0
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        write_mask(tmp_path / "masks" / f"{i}.png", mask)
        tags = tuple(int(k) for k in np.unique(mask) if 0 < k < 255)[: 1 + i % 3]
        records.append(Record(str(i), tmp_path / f"{i}.png", tmp_path / "masks" / f"{i}.png", tags))
    return Split("val", ("background", "cat", "dog", "boat"), tuple(records))


@pytest.fixture
def make_run(split, tmp_path):
    """``make_run(name, seed, lr)``: the folder of a run with two validations."""
    names = ("background", "<b>cat</b>", "dog & cat", "boat")
    records = (replace(split.records[0], name="</script><img src=x onerror=alert(1)>"), *split.records[1:])
    split = Split("val", names, records)

    weights = {"cls": 1.0, "seg": [[0, 0.0], [4, 0.1]], "later": [[0, 0.0], [99, 1.0]]}

    def make(name, seed=0, lr=0.1):
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        config = {"run_name": name, "seed": seed, "optim": {"lr": lr}, "train": {"steps": 8}}
        config |= {"eval": {"select": "seg"}, "data": {"name": "toy", "root": f"/data/{name}"}}
        config["method"] = {"target": "methods.toy.Colours", "loss_weights": weights}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        about = {
            "command": "train.py",
            "seed": seed,
            "git_commit": None,
            "data_fingerprint": "f",
            "images": 5,
        }
        about |= {"processes": 1, "versions": {}, "split": "val", "pairs": tag_pairs(split)}
        (folder / "run.json").write_text(json.dumps({**about, "class_names": names}))
        from tests.engine.test_validation import Colours

        dataset, method = WeakSegDataset(split, with_mask=True), Colours()
        writer = MetricsWriter(folder)
        for step in (4, 8):
            result = validate(method, dataset, size=32, device="cpu", progress=False)
            writer.write(step, {"lr": lr, "seconds_per_step": 0.5, "loss": {"cls": 1 / step, "later": 1.0}})
            writer.write(step, {"val": {"seg": result.percent()["seg"] + seed - step / 100}})
            write_scores(folder, result.records(protocols(method, "val"), {}, {"step": step}))
            record_seen(folder, result, method, dataset, step=step, size=32, device="cpu")
        writer.close()
        return folder

    return make
