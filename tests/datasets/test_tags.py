"""Tags of the stated forms are read alike; everything else is one error that names file, line and column."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.tags import classes_of, near_duplicates, read_tags, tag_entries, write_tags

CLASSES = ("background", "cat", "dog", "traffic light")
TAGS = {"a": (1, 2), "b": (), "c": (3,)}


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "name,tags\na.jpg,dog;cat\nb,\nc,traffic light;\n",
        "a,dog;cat\nb\nc.png,traffic light\n",
        "a,dog;cat\rb\rc.png,traffic light\r",
        'image,tags\n"a",cat,dog\nb,\nc,traffic light\n',
        "name;tags\na.jpg;dog;cat\nb;\nc;traffic light;\n",  # a spreadsheet in Europe
        'name;tags\na.jpg;"dog;cat"\nb;\nc;traffic light\n',
        "image;tag;tag\na;cat;dog\nb;;\nc;traffic light;\n",
        "image,traffic light,cat,dog\na.jpg,0,1,1\nb,0,0,0\nc,1,0,0\n",  # a column for each class
        "photo;cat;dog;traffic light;\na.jpg;1.0;1.0;0.0;\n\nb;0.0;0.0;0.0\nc;0.0;0.0;1.0;\n",
        ",cat,dog,traffic light\na,True,True,False\nb,False,False,False\nc,False,False,True\n",
        "sep=;\nImage Name;cat;dog;traffic light\na;1;1;0\nb;0;0;0\nc;0;0;1\n",  # Excel
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_form_of_csv_reads_the_same(tmp_path, text, encoding):
    assert read_tags(write(tmp_path / "tags.csv", text, encoding), CLASSES) == TAGS


def test_json_and_text_read_the_same(tmp_path):
    content = {"a.jpg": ["dog", "cat", "dog"], "b": [], "c": ["traffic light"]}
    assert read_tags(write(tmp_path / "tags.json", json.dumps(content)), CLASSES) == TAGS
    assert read_tags(write(tmp_path / "tags.txt", "a dog cat\n\nb\n"), CLASSES) == {"a": (1, 2), "b": ()}


# U+037E becomes a semicolon in normal form.
letters = st.characters(exclude_categories=("C", "Z"), exclude_characters=',;"|[]{}./\u037e')
words = st.text(letters, min_size=1, max_size=9).map(lambda word: unicodedata.normalize("NFC", "c" + word))


@given(st.dictionaries(words, st.lists(words, unique=True, max_size=4), min_size=1))
def test_written_tags_read_back(tmp_path_factory, tags):
    path = tmp_path_factory.mktemp("tags") / "tags.csv"
    write_tags(path, tags)
    classes = ("background", *sorted({word for words in tags.values() for word in words}))
    read = {image: {classes[k] for k in ids} for image, ids in read_tags(path, classes).items()}
    assert read == {image: set(words) for image, words in tags.items()}


@pytest.mark.parametrize("columns", ["cat,bird,traffic light", "cat;bird;traffic light"])
def test_header_of_a_table_names_the_classes(tmp_path, columns):
    """Those that no image has among them; with known classes it is checked as tags are."""
    separator = columns[3]
    rows = "image,{}\na.jpg,1,0,0\nb.jpg,0,0,1\n".replace(",", separator).format(columns)
    path = write(tmp_path / "tags.csv", rows)
    assert classes_of(path) == ["bird", "cat", "traffic light"]
    with pytest.raises(ValueError, match=r"tags\.csv, line 1, column 3: 'bird'"):
        read_tags(path, CLASSES)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("image,cat,dog\na,1,0\nb,2,0\n", "line 3, column 2: '2'"),
        ("image,cat,dog\na,yes,no\n", "line 2, column 2: 'yes'"),
        ("image,cat,dog\na,1,0\nb,1,\n", "line 3, column 3: class 'dog' is empty"),
        ("Dateiname,Schlagworte\na.jpg,cat\n", "line 1 looks like a header"),
        ("image,cat\na,1\nb,1,0\n", "line 3: 2 values"),
        ("image,split,cat,dog\na,train,1,0\n", "line 2, column 2: 'train'"),
        ("image,tags,split\na,cat,train\n", "line 1, column 3: 'split'"),
        ("a.jpg,1,0\nb.jpg,1,0\n", "every tag"),
        ("image,tags\na,yes\nb,no\n", "every tag"),
        ("image,tags\na,cat\nb,dgo\n", "line 3, column 2: 'dgo' is not a class: did you mean 'dog'"),
        ("a.jpg,cat\na,dog\n", "line 2: image 'a'"),
        ("a,cat\nb,background\n", "line 2, column 2"),
        ("a,cat\n,dog\n", "line 2: the image name"),
        ("image\ttags\na.jpg\tcat;dog\n", "not tabs"),
        ("a,cat\nb,do\u200bg\n", "line 2, column 2.*ZERO WIDTH"),
        ("a,cat\n../b,dog\n", "leaves its folder"),
    ],
)
def test_other_forms_of_csv_are_refused_with_their_place(tmp_path, text, place):
    with pytest.raises(ValueError, match=place):
        read_tags(write(tmp_path / "tags.csv", text), CLASSES)


@pytest.mark.parametrize(
    ("file", "text", "term"),
    [
        ("tags.json", "{", "not valid JSON"),
        ("tags.json", '{"a": "cat"}', "image 'a'"),
        ("tags.json", '{"a": ["cat"], "b": [], "a": ["dog"]}', "'a' appears twice"),
        ("tags.tsv", "image\ttags\n", "must be one of"),
        ("tags.txt", "a\tcat\n", "line 1: .*a tab"),
    ],
)
def test_other_files_are_refused(tmp_path, file, text, term):
    with pytest.raises(ValueError, match=term):
        read_tags(write(tmp_path / file, text), CLASSES)


def test_accents_have_one_spelling(tmp_path):
    decomposed, composed = "caf\u0065\u0301", "caf\u00e9"
    rows = {"a": [decomposed], "b": [composed], decomposed: []}
    write(tmp_path / "tags.csv", "".join(f"{image},{';'.join(words)}\n" for image, words in rows.items()))
    write(tmp_path / "tags.json", json.dumps(rows))  # escapes every accent
    for path in (tmp_path / "tags.csv", tmp_path / "tags.json"):
        assert classes_of(path) == [composed]
        assert read_tags(path, ("background", composed)) == {"a": (1,), "b": (1,), composed: ()}


def test_classes_may_be_called_by_numbers(tmp_path):
    digits = ("background", "0", "1", "2")
    for text in ("image,label\na,0\nb,1\n", "a,0\nb,1\n", "image,0,1,2\na,1,0,0\nb,0,1,0\n"):
        assert read_tags(write(tmp_path / "tags.csv", text), digits) == {"a": (1,), "b": (2,)}
    assert classes_of(write(tmp_path / "tags.csv", "image,label\na,0\nb,7\n")) == ["0", "7"]


@pytest.mark.parametrize(
    "text",
    [
        "a,cat\nb,Cat", "a,cat|dog", 'a,"cat,dog"', "a,cat dog\nb,cat\nc,dog",
        "a,cat,train\nb,dog,val", "a,cat,12,30\nb,dog,7,0.5",
    ],
)  # fmt: skip
def test_words_that_would_be_classes_by_mistake_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="only in case|several tags|hardly a class"):
        classes_of(write(tmp_path / "tags.csv", text))


def test_classes_one_letter_apart_are_worth_a_warning():
    words = ["zebra", "zabra", "cat", "cow", "type 267", "type 268", "tipe 267"]
    assert near_duplicates(words) == [("zebra", "zabra"), ("type 267", "tipe 267")]


def test_tags_of_other_programs_are_read(tmp_path):
    """The .npy dictionaries of ToCo and IRN: string or number keys, a multi-hot vector for each image."""
    path = tmp_path / "tags.npy"
    vectors = {"2007_000032.jpg": [0, 1], np.int32(2007000033): [1, 1], "2007000034": [0, 0]}
    np.save(path, {key: np.array(vector, dtype=np.float32) for key, vector in vectors.items()})
    read = read_tags(path, CLASSES[:3])
    assert read == {"2007_000032": (2,), "2007_000033": (1, 2), "2007000034": ()}
    for classes, term in ((CLASSES, "3 classes"), ((), "class_names")):
        with pytest.raises(ValueError, match=term):
            tag_entries(path, classes)
    for vectors, term in (({"a": [0, 0.5]}, "0 or 1"), ({"a": [1, 0], "a.jpg": [0, 1]}, "appears twice")):
        np.save(path, vectors)
        with pytest.raises(ValueError, match=term):
            read_tags(path, CLASSES[:3])
