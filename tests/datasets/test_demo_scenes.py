"""Generated scenes: what is planted is there, files agree with what is drawn, reruns change nothing."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from datasets.demo.contexts import CONTEXTS
from datasets.demo.objects import OBJECTS
from datasets.demo.scene import SPLITS, SceneOptions, context_given_class, draw_content, render_scene
from datasets.demo.write import image_name, read_meta, write_dataset
from datasets.voc import voc_split
from engine.config.load import CONFIGS
from tools import make_demo_data
from utils.image import read_image, read_mask

SMALL = SceneOptions(seed=3, train=6, test=3, image_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    write_dataset(root, SMALL, workers=1, progress=False)
    return root


def test_an_image_depends_on_nothing_but_seed_split_index_and_options():
    first = [render_scene(SMALL, "train", i).image for i in range(4)]
    for i in (3, 0, 2):  # another order, after other images, in a set of another size
        np.testing.assert_array_equal(
            render_scene(replace(SMALL, train=99, test=0), "train", i).image, first[i]
        )
    assert (render_scene(replace(SMALL, seed=4), "train", 0).image != first[0]).any()
    assert (render_scene(SMALL, "test", 0).image != first[0]).any()


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_objects_of_partnered_classes_stand_on_their_partner_with_the_given_probability(strength: float):
    options = SceneOptions(strength=strength)
    table = np.zeros((len(options.classes), len(CONTEXTS)))
    for index in range(4000):
        context, classes = draw_content(options, "train", index)
        np.add.at(table, (classes, CONTEXTS.index(context)), 1)
    table /= table.sum(1, keepdims=True)
    # About 1,200 objects per class, those of an image not independent of each other: 0.05 is over 2.5 sigma.
    np.testing.assert_allclose(table, context_given_class(options), atol=0.05)
    assert context_given_class(options)[0, CONTEXTS.index("water")] == strength


def test_contexts_of_the_shuffled_split_do_not_depend_on_the_class():
    options = SceneOptions()
    table = np.zeros((len(options.classes), len(CONTEXTS)))
    for index in range(4000):
        context, classes = draw_content(options, "test_shuffled", index)
        assert classes == draw_content(options, "test", index)[1]
        np.add.at(table, (classes, CONTEXTS.index(context)), 1)
    table /= table.sum(1, keepdims=True)
    np.testing.assert_allclose(
        table, np.broadcast_to(context_given_class(options).mean(0), table.shape), atol=0.05
    )


def test_shuffled_scenes_show_the_objects_of_the_test_scenes_elsewhere():
    pairs = [(render_scene(SMALL, "test", i), render_scene(SMALL, "test_shuffled", i)) for i in range(8)]
    for matched, shuffled in pairs:
        np.testing.assert_array_equal(matched.mask, shuffled.mask)
        assert matched.objects == shuffled.objects
    assert any(matched.context != shuffled.context for matched, shuffled in pairs)


def test_colours_do_not_change_shapes():
    for index in range(6):
        own, foreign = (render_scene(replace(SMALL, appearance=p), "train", index) for p in (1.0, 0.0))
        np.testing.assert_array_equal(own.mask, foreign.mask)
        # And the mask says where they are: nothing else differs.
        changed = np.abs(own.image.astype(int) - foreign.image).max(2) > 60
        assert not (changed & (own.mask == 0)).sum() > 0.02 * changed.size


def test_share_of_empty_images_follows_the_option():
    def empty(share: float) -> float:
        options = SceneOptions(empty=share)
        return float(np.mean([not draw_content(options, "train", i)[1] for i in range(1000)]))

    assert empty(0.0) == 0.0 and empty(1.0) == 1.0
    assert abs(empty(0.25) - 0.25) < 0.05
    assert not render_scene(replace(SMALL, empty=1.0), "train", 0).mask.any()


@pytest.mark.parametrize("name", OBJECTS)
def test_every_class_can_be_drawn_alone_and_is_large_enough_to_see(name: str):
    options = SceneOptions(classes=(name,), partnered=(name,), strength=1.0, empty=0.0)
    for index in range(4):
        scene = render_scene(options, "train", index)
        assert scene.context == OBJECTS[name].home
        assert {item.class_id for item in scene.objects} == {1} and (scene.mask == 1).sum() >= 40


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_have_texture_and_fill_the_ground(context: str):
    home = next(name for name, item in OBJECTS.items() if item.home == context)
    options = SceneOptions(classes=(home,), partnered=(home,), strength=1.0, empty=1.0, far_context=0.0)
    scene = render_scene(options, "train", 0)
    ground = scene.context_map == CONTEXTS.index(context)
    assert set(np.unique(scene.context_map)) <= {CONTEXTS.index(context), 255} and ground.mean() > 0.5
    assert scene.image[ground].std() > 5


def test_masks_annotations_and_tags_agree(folder: Path):
    for split in SPLITS:
        voc = voc_split(folder, split, masks="SegmentationClass", class_names="class_names.txt")
        assert len(voc.records) == SMALL.count(split) and voc.class_names == ("background", *SMALL.classes)
        for index, record in enumerate(voc.records):
            scene, mask = render_scene(SMALL, split, index), read_mask(record.mask)
            np.testing.assert_array_equal(mask, scene.mask)
            assert record.tags == tuple(int(k) for k in np.unique(mask) if k)
            error = np.asarray(read_image(record.image), float) - scene.image
            assert np.abs(error).mean() < 4  # JPEG
            boxes = ElementTree.parse(folder / "Annotations" / f"{record.name}.xml").findall("object")
            assert [item.findtext("name") for item in boxes] == [
                SMALL.classes[item.class_id - 1] for item in scene.objects
            ]
            inside = np.zeros(mask.shape, bool)
            for item in boxes:
                x0, y0, x1, y1 = (
                    int(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
                )
                assert 1 <= x0 <= x1 <= mask.shape[1] and 1 <= y0 <= y1 <= mask.shape[0]
                inside[y0 - 1 : y1, x0 - 1 : x1] = True
            assert inside[mask > 0].all()


def test_a_second_run_touches_nothing_and_an_interrupted_one_is_continued(folder: Path):
    meta = read_meta(folder)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert write_dataset(folder, SMALL, workers=1, progress=False) == meta
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    name = image_name("train", 2)
    (folder / "Annotations" / f"{name}.xml").unlink()
    (folder / "JPEGImages" / f"{name}.jpg").unlink()
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace("fingerprint", "unfinished"))
    kept = folder / "JPEGImages" / f"{image_name('train', 1)}.jpg"
    assert write_dataset(folder, SMALL, workers=1, progress=False) == meta
    assert kept.stat().st_mtime_ns == files[kept]


def test_more_images_leave_the_first_ones_as_they_are(folder: Path, tmp_path: Path):
    write_dataset(tmp_path, replace(SMALL, train=2, test=1), workers=1, progress=False)
    for path in (path for path in tmp_path.rglob("*_0000*") if path.is_file()):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_other_options_are_refused_or_replace_the_set_when_told(tmp_path: Path):
    options = replace(SMALL, train=3, test=1)
    write_dataset(tmp_path, options, workers=1, progress=False)
    fewer = replace(options, train=1, strength=0.5)
    with pytest.raises(FileExistsError, match=r"strength: 0\.9 -> 0\.5"):
        write_dataset(tmp_path, fewer, workers=1, progress=False)
    meta = write_dataset(tmp_path, fewer, overwrite=True, workers=1, progress=False)
    assert meta["options"]["strength"] == 0.5
    assert len(list((tmp_path / "JPEGImages").iterdir())) == 3


def test_a_folder_of_real_data_is_never_written_to(tmp_path: Path):
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(FileExistsError, match="another data set"):
        write_dataset(tmp_path, SMALL, overwrite=True, workers=1, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["boat", "plane"]}, "plane"),
        ({"classes": ["boat"]}, "sheep"),  # partnered by default, but no longer a class
        ({"strength": 1.2}, "strength"),
        ({"object_size": [0.5, 0.3]}, "object_size"),
        ({"object_size": [0.1, 0.3], "image_size": 64}, "8 pixels"),
        ({"max_objects": 0}, "max_objects"),
    ],
)
def test_bad_options_are_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SceneOptions(**change)


def test_the_demo_config_says_every_option_and_its_default():
    spec = yaml.safe_load((CONFIGS / "datasets/demo.yaml").read_text())["data"]["generate"]
    assert spec.pop("target") == "datasets.demo.scene.SceneOptions"
    assert SceneOptions(**spec) == SceneOptions() and set(spec) == set(asdict(SceneOptions()))


def test_the_tool_takes_options_and_refuses_unknown_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = ["train=2", "test=1", "image_size=64", "strength=0.7", "workers=1"]
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", f"out={tmp_path / 'set'}", *small])
    make_demo_data.main()
    assert "train 2, test 1, test_shuffled 1 images" in capsys.readouterr().out
    assert read_meta(tmp_path / "set")["options"]["strength"] == 0.7

    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", f"out={tmp_path / 'other'}", "strenght=0.7"])
    with pytest.raises(KeyError, match="did you mean 'strength'"):
        make_demo_data.main()
    assert not (tmp_path / "other").exists()
