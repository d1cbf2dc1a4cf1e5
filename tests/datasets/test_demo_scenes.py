"""Generated scenes: what is planted is there, files agree with what is drawn, reruns change nothing."""

from dataclasses import replace

import numpy as np
import pytest

from datasets.demo.contexts import CONTEXTS
from datasets.demo.objects import OBJECTS
from datasets.demo.scene import SPLITS, SceneOptions, context_given_class, draw_content, render_scene
from datasets.demo.write import read_meta, write_dataset
from datasets.voc import voc_split
from utils.image import read_image, read_mask

SMALL = SceneOptions(seed=3, train=6, test=3, image_size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    write_dataset(root, SMALL, workers=1)
    return root


def test_an_image_depends_on_nothing_but_seed_split_index_and_options():
    first = [render_scene(SMALL, "train", i).image for i in range(4)]
    for i in (3, 0, 2):  # another order, after other images, in a set of another size
        again = render_scene(replace(SMALL, train=99, test=0), "train", i)
        np.testing.assert_array_equal(again.image, first[i])
    assert (render_scene(replace(SMALL, seed=4), "train", 0).image != first[0]).any()
    assert (render_scene(SMALL, "test", 0).image != first[0]).any()


def contexts_of_classes(options, split):
    """(C, contexts) share of the objects of each class on each context."""
    table = np.zeros((len(options.classes), len(CONTEXTS)))
    for index in range(4000):
        context, classes = draw_content(options, split, index)
        np.add.at(table, (classes, CONTEXTS.index(context)), 1)
    return table / table.sum(1, keepdims=True)


@pytest.mark.parametrize(("strength", "split"), [(0.3, "train"), (0.9, "train"), (0.9, "test_shuffled")])
def test_contexts_follow_the_class_in_training_and_not_when_shuffled(strength, split):
    options = SceneOptions(strength=strength)
    expected = context_given_class(options)
    assert expected[0, CONTEXTS.index("water")] == strength
    if split == "test_shuffled":
        expected = np.broadcast_to(expected.mean(0), expected.shape)
    # About 1,200 objects per class, those of an image not independent of each other: 0.05 is over 2.5 sigma.
    np.testing.assert_allclose(contexts_of_classes(options, split), expected, atol=0.05)


def test_shuffled_scenes_show_the_objects_of_the_test_scenes_elsewhere():
    pairs = [(render_scene(SMALL, "test", i), render_scene(SMALL, "test_shuffled", i)) for i in range(8)]
    for matched, shuffled in pairs:
        np.testing.assert_array_equal(matched.mask, shuffled.mask)
    assert any(matched.context != shuffled.context for matched, shuffled in pairs)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_class_and_its_context_can_be_seen(name):
    home = OBJECTS[name].home
    options = SceneOptions(classes=(name,), partnered=(name,), strength=1.0, empty=0.0, far_context=0.0)
    for index in range(4):
        scene = render_scene(options, "train", index)
        assert scene.context == home and (scene.mask == 1).sum() >= 40 and scene.mask.max() == 1
    scene = render_scene(replace(options, empty=1.0), "train", 0)
    ground = scene.context_map == CONTEXTS.index(home)
    assert set(np.unique(scene.context_map)) <= {CONTEXTS.index(home), 255} and ground.mean() > 0.5
    assert scene.image[ground].std() > 5


def test_images_masks_and_tags_agree(folder):
    for split in SPLITS:
        voc = voc_split(folder, split, masks="SegmentationClass", class_names="class_names.txt")
        assert len(voc.records) == SMALL.count(split) and voc.class_names == ("background", *SMALL.classes)
        for index, record in enumerate(voc.records):
            scene, mask = render_scene(SMALL, split, index), read_mask(record.mask)
            np.testing.assert_array_equal(mask, scene.mask)
            assert record.tags == tuple(int(k) for k in np.unique(mask) if k)
            error = np.asarray(read_image(record.image), float) - scene.image
            assert np.abs(error).mean() < 4  # JPEG


def test_a_second_run_touches_nothing_and_an_interrupted_one_is_continued(folder):
    meta = read_meta(folder)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert write_dataset(folder, SMALL, workers=1) == meta
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    (folder / "SegmentationClass/train_00002.png").unlink()
    (folder / "JPEGImages/train_00002.jpg").unlink()
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace("fingerprint", "unfinished"))
    kept = folder / "JPEGImages/train_00001.jpg"
    assert write_dataset(folder, SMALL, workers=1) == meta
    assert kept.stat().st_mtime_ns == files[kept]


@pytest.mark.parametrize("file", ["JPEGImages/a.jpg", "meta.json"])
def test_a_folder_of_real_data_is_never_written_to(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(FileExistsError, match="another folder"):
        write_dataset(tmp_path, SMALL, workers=1)
