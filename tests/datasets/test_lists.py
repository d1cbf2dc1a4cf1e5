import json

import numpy as np
import pytest

from datasets.lists import (
    file_of,
    find_list,
    read_class_names,
    read_list,
    read_tags,
    tag_words,
    write_tags,
)
from utils.files import require_files

CLASSES = ("background", "cat", "dog", "traffic light")


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tags.csv", "name,tags\na.jpg,dog;cat\nb,\nc,traffic light;\n"),
        ("tags.csv", "a,dog;cat\nb\nc.png,traffic light\n"),
        ("tags.csv", 'image,tags\n"a",cat,dog\nb,\nc,traffic light\n'),
        ("tags.csv", "name;tags\na.jpg;dog;cat\nb;\nc;traffic light;\n"),  # a spreadsheet in Europe
        ("tags.csv", "a.jpg;dog,cat\nb\nc;traffic light\n"),
        ("tags.csv", 'name,tags\na.jpg,"dog, cat"\nb,\nc,traffic light\n'),
        ("tags.csv", 'name;tags\na.jpg;"dog;cat"\nb;\nc;traffic light\n'),  # our own form, saved there
        ("tags.csv", "image;tag;tag\na;cat;dog\nb;;\nc;traffic light;\n"),
        (
            "tags.csv",
            "image,traffic light,cat,dog\na.jpg,0,1,1\nb,0,0,0\nc,1,0,0\n",
        ),  # a column for each class
        ("tags.csv", "photo;cat;dog;traffic light;\na.jpg;1.0;1.0;0.0;\n\nb;0.0;0.0;0.0\nc;0.0;0.0;1.0;\n"),
        ("tags.csv", ",cat,dog,traffic light\na,True,True,False\nb,False,False,False\nc,False,False,True\n"),
        ("tags.json", json.dumps({"a.jpg": ["dog", "cat", "dog"], "b": [], "c": ["traffic light"]})),
    ],
)
def test_every_form_of_tags_reads_the_same(tmp_path, file, text):
    assert read_tags(write(tmp_path / file, text), CLASSES) == {"a": (1, 2), "b": (), "c": (3,)}


def test_text_and_space_separated_csv(tmp_path):
    expected = {"a": (1, 2), "b": ()}
    assert read_tags(write(tmp_path / "labels.txt", "a dog cat\n\nb\n"), CLASSES) == expected
    for text in ("a,dog cat\nb,\n", "a;dog cat\nb;\n"):
        assert read_tags(write(tmp_path / "tags.csv", text), CLASSES) == expected


def test_a_missing_data_set_folder_is_said_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no data set folder .*set data.root"):
        read_class_names("class_names.txt", tmp_path / "nowhere", ())


def test_class_names_torn_by_spaces_are_asked_about(tmp_path):
    """Without known classes and without any ';' nothing tells one tag of two words from two tags."""
    path = tmp_path / "tags.csv"
    path.write_text("a.jpg,potted plant\nb.jpg,dog\nc.jpg,potted plant\n")
    with pytest.raises(ValueError, match="'potted plant' always stand together.*write it as 'potted plant;'"):
        tag_words(path)
    assert read_tags(path, ["background", "dog", "potted plant"]) == {"a": (2,), "b": (1,), "c": (2,)}
    path.write_text("a.jpg,potted plant;\nb.jpg,dog\n")
    assert [words for _, words, _ in tag_words(path)] == [["potted plant"], ["dog"]]
    path.write_text("a.jpg;potted plant;dog\nb.jpg;dog\n")
    assert [words for _, words, _ in tag_words(path)] == [["potted plant", "dog"], ["dog"]]
    path.write_text('a.jpg,"potted plant,dog"\nb.jpg,dog\n')
    assert [words for _, words, _ in tag_words(path)] == [["potted plant", "dog"], ["dog"]]
    path.write_text("a.jpg,potted plant,dog\nb.jpg,dog,\n")
    assert [words for _, words, _ in tag_words(path)] == [["potted plant", "dog"], ["dog"]]
    path.write_text("a.jpg,cat dog\nb.jpg,dog\n")
    assert [words for _, words, _ in tag_words(path)] == [["cat", "dog"], ["dog"]]


def test_header_of_a_table_names_the_classes(tmp_path):
    """Those that no image has among them; with known classes it is checked as tags are."""
    path = write(tmp_path / "tags.csv", "image,cat,bird,traffic light\na.jpg,1,0,0\nb.jpg,0,0,1\n")
    words = [words for _, words, _ in tag_words(path)]
    assert words == [["cat", "bird", "traffic light"], ["cat"], ["traffic light"]]
    with pytest.raises(ValueError, match=r"tags\.csv, line 1: 'bird' is not a class"):
        read_tags(path, CLASSES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,cat,dog\na,1,0\nb,2,0\n", r"line 3: '2' in the column of class 'cat' is neither 0 nor 1"),
        ("image;cat;dog\na;;1\nb;0;1\n", r"line 2: '' in the column of class 'cat' is neither 0 nor 1"),
        ("image,cat,dog\na,1,0\nb,1\n", "line 3: 1 values, but line 1 names 2 classes"),
        ("image,cat\na,1\nb,1,0\n", "line 3: 2 values, but line 1 names 1 classes"),
        ("a.jpg,1,0\nb.jpg,1,0\n", r"every tag is 0 or 1.*first line names the classes \(image,cat,dog\)"),
        ("image,tags\na,1\nb,1\n", "every tag is 1.*first line names the classes"),
        ("image;;\na;1;0\nb;0;1\n", "every tag is 0 or 1.*first line names the classes"),
    ],
)
@pytest.mark.parametrize("class_names", [(), CLASSES])
def test_bad_tables_of_classes_are_named(tmp_path, text, message, class_names):
    with pytest.raises(ValueError, match=message):
        tag_words(write(tmp_path / "tags.csv", text), class_names)


def test_classes_may_be_called_by_numbers(tmp_path):
    digits = ("background", "0", "1", "2")
    for text in ("image,digit\na,0\nb,1\n", "a,0\nb,1\n"):
        assert read_tags(write(tmp_path / "tags.csv", text), digits) == {"a": (1,), "b": (2,)}
    path = write(tmp_path / "tags.csv", "image,label\na,0\nb,7\n")
    assert [words for _, words, _ in tag_words(path)] == [["0"], ["7"]]


def test_written_tags_read_back(tmp_path):
    tags = {"a": ["cat", "traffic light"], "b": [], "folder/c": ["traffic light"]}
    write_tags(tmp_path / "tags.csv", tags)
    # Without the class names too, where a space could have split a name.
    assert read_tags(tmp_path / "tags.csv", CLASSES) == {"a": (1, 3), "b": (), "folder/c": (3,)}


def test_unknown_tag_names_file_line_word_and_closest_class(tmp_path):
    path = write(tmp_path / "tags.csv", "name,tags\na,cat\nb,dgo\n")
    with pytest.raises(ValueError, match=r"tags\.csv, line 3: 'dgo' is not a class: did you mean 'dog'"):
        read_tags(path, CLASSES)
    with pytest.raises(ValueError, match="leave the tags of an image without objects empty"):
        read_tags(write(tmp_path / "t.txt", "a background\n"), CLASSES)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tags.csv", "a,cat\na.jpg,dog\n", "line 2: image 'a' is named a second time"),
        ("tags.json", "{", "not valid JSON"),
        ("tags.json", "[1]", "must be a mapping"),
        ("tags.json", '{"a": "cat"}', "must be a list of class names"),
    ],
)
def test_malformed_tags_are_named(tmp_path, file, text, message):
    with pytest.raises(ValueError, match=message):
        read_tags(write(tmp_path / file, text), CLASSES)


def test_lists_of_all_forms(tmp_path):
    text = "/JPEGImages/2007_01.jpg /SegmentationClassAug/2007_01.png\n\n2007_02 1\nplain.v2\n"
    assert read_list(write(tmp_path / "a.txt", text)) == ["2007_01", "2007_02", "plain.v2"]
    assert read_list(write(tmp_path / "b.txt", "my dog.jpg\n"), whole_lines=True) == ["my dog"]


def test_bad_lists_say_why(tmp_path):
    write(tmp_path / "train.txt", "a\nb\na\n")
    with pytest.raises(ValueError, match=r"1 of 3 images \(a\) more than once"):
        read_list(tmp_path / "train.txt")
    with pytest.raises(ValueError, match="is empty"):
        read_list(write(tmp_path / "empty.txt", "\n"))
    with pytest.raises(FileNotFoundError, match="lists in that folder: empty, train"):
        read_list(tmp_path / "val.txt")


def test_a_list_is_a_name_or_a_path(tmp_path):
    assert find_list(tmp_path, "lists", "train") == tmp_path / "lists" / "train.txt"
    own = write(tmp_path / "own.txt", "a\n")
    assert find_list(tmp_path, "lists", str(own)) == own
    assert find_list(tmp_path, "lists", "own.txt") == own


def test_class_names_get_their_background(tmp_path):
    write(tmp_path / "names.txt", "cat\ntraffic light\n")
    assert read_class_names("names.txt", tmp_path, ()) == ("background", "cat", "traffic light")
    assert read_class_names(["background", "cat"], tmp_path, ()) == ("background", "cat")
    with pytest.raises(ValueError, match="not unique: cat"):
        read_class_names(["cat", "cat"], tmp_path, ())
    with pytest.raises(FileNotFoundError, match=r"data\.options\.class_names"):
        read_class_names("none.txt", tmp_path, ())


@pytest.mark.parametrize("first", ["_background_", "Background", "BACKGROUND", "__background__", "bg"])
def test_background_by_any_name_is_mask_value_0(tmp_path, first):
    write(tmp_path / "names.txt", f"{first}\ncat\ndog\n\n \n")  # blank lines at the end name nothing
    assert read_class_names("names.txt", tmp_path, ()) == ("background", "cat", "dog")
    assert read_class_names([first, "cat"], tmp_path, ()) == ("background", "cat")
    write(tmp_path / "names.txt", f"__ignore__\n{first}\ncat\n")
    with pytest.raises(ValueError, match=rf"names\.txt: '{first}' is name 2, but background is mask value 0"):
        read_class_names("names.txt", tmp_path, ())


@pytest.mark.parametrize(("names", "line"), [("background\ncat\n\ndog\n", 3), ("\ncat\n", 1)])
def test_a_blank_line_that_would_shift_mask_values_is_named(tmp_path, names, line):
    write(tmp_path / "names.txt", names)
    with pytest.raises(ValueError, match=rf"names\.txt: line {line} is blank, but line k names mask value k"):
        read_class_names("names.txt", tmp_path, ())


def test_files_by_folder_and_by_pattern(tmp_path):
    name = "COCO_val2014_000000000042"
    assert file_of(tmp_path, "{part}2014", name, ".jpg") == tmp_path / "val2014" / f"{name}.jpg"
    assert file_of(tmp_path, "{part}/{number}.png", name, ".png") == tmp_path / "val" / "000000000042.png"
    assert file_of(tmp_path, "images/{name}.webp", "a", ".jpg") == tmp_path / "images" / "a.webp"


def test_missing_files_are_counted_and_the_first_is_named(tmp_path):
    write(tmp_path / "a.png", "")
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 masks of split 'x' are missing, first .*b\.png; do this"
    ):
        require_files([tmp_path / f"{n}.png" for n in "abc"], "masks of split 'x'", "do this")


def test_tags_of_other_programs_are_read(tmp_path):
    """The .npy dictionaries of ToCo and IRN: string or number keys, a multi-hot vector for each image."""
    names = ("background", "cat", "dog")
    vectors = {"2007_000032": [0, 1], np.int32(2007000033): [1, 1], "COCO_train2014_000000000009": [0, 0]}
    np.save(tmp_path / "tags.npy", {key: np.array(v, dtype=np.float32) for key, v in vectors.items()})
    assert read_tags(tmp_path / "tags.npy", names) == {
        "2007_000032": (2,),
        "2007_000033": (1, 2),
        "COCO_train2014_000000000009": (),
    }
    with pytest.raises(ValueError, match="2 values, but there are 3 classes"):
        read_tags(tmp_path / "tags.npy", (*names, "cow"))
