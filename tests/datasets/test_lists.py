"""Lists of names, class names, and the file that belongs to a name."""

import pytest

from datasets.lists import HOLE, find_list, read_class_names, read_list


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_lists_of_all_forms(tmp_path):
    text = "/JPEGImages/2007_01.jpg /SegmentationClassAug/2007_01.png\n\n2007_02 1\nplain.v2\n"
    assert list(read_list(write(tmp_path / "a.txt", text))) == ["2007_01", "2007_02", "plain.v2"]
    assert list(read_list(write(tmp_path / "b.txt", "my dog.jpg\n"), whole_lines=True)) == ["my dog"]


@pytest.mark.parametrize(
    ("text", "term"),
    [("a\nb\na\n", r"1 of 3 images \(a\)"), ("\n", "is empty"), ("../a\n", "leaves"), ("a\0\n", "U.0000")],
)
def test_bad_lists_say_why(tmp_path, text, term):
    with pytest.raises(ValueError, match=term):
        read_list(write(tmp_path / "train.txt", text))


def test_a_list_is_a_name_or_a_path(tmp_path):
    assert find_list(tmp_path, "lists", "train") == tmp_path / "lists" / "train.txt"
    own = write(tmp_path / "own.txt", "a\n")
    assert find_list(tmp_path, "lists", str(own)) == find_list(tmp_path, "lists", "own.txt") == own
    with pytest.raises(FileNotFoundError, match="lists there: own"):
        read_list(tmp_path / "val.txt")


@pytest.mark.parametrize("first", ["", "_background_\n", "Background\n", "BACKGROUND\n", "bg\n"])
def test_background_by_any_name_is_mask_value_0(tmp_path, first):
    write(tmp_path / "names.txt", f"{first}cat\ntraffic light\n\n \n")  # blank lines at the end name nothing
    assert read_class_names("names.txt", tmp_path, ()) == ("background", "cat", "traffic light")
    assert read_class_names([*first.split(), "cat"], tmp_path, ()) == ("background", "cat")


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("background\ncat\n\ndog\n", "line 3"),
        ("cat\ncat\n", "not unique: cat"),
        ("cat\u200b\n", "line 1.*ZERO WIDTH"),
    ],
)
def test_class_names_that_would_shift_mask_values_are_refused(tmp_path, text, term):
    write(tmp_path / "names.txt", text)
    with pytest.raises(ValueError, match=rf"names\.txt.*{term}"):
        read_class_names("names.txt", tmp_path, ())


def test_no_class_has_mask_value_255(tmp_path):
    words = [f"c{k}" for k in range(1, 65536)]
    names = read_class_names(words[:300], tmp_path, ())
    assert names[254:257] == ("c254", HOLE, "c255") and len(names) == 302
    assert read_class_names(list(names), tmp_path, ()) == names
    assert len(read_class_names(words[:254], tmp_path, ())) == 255
    assert read_class_names(words[:-1], tmp_path, ())[65535] == "c65534"
    for wrong, term in (
        (words, "65535 classes are too many"),
        ([HOLE], "can be called"),
        ([*words[:300], HOLE], "can be"),
    ):
        with pytest.raises(ValueError, match=term):
            read_class_names(wrong, tmp_path, ())
