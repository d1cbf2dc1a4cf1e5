"""Image-level tags in a file: stated forms are read, all else is one error with file and place.

``.csv``   comma or semicolon, UTF-8 or UTF-16 with BOM. Either the image's name, then its tags, several in
           one cell (``dog;cat``) or in columns of their own, with an optional header ``image,tags``. Or a
           header that names the classes (``image,dog,cat``), and 0 or 1 in every other cell.
``.json``  ``{image: [tag, ...]}``
``.txt``   ``image tag tag`` per line, separated by spaces
``.npy``   the dictionary image -> 0/1 vector over the foreground classes of other programs
"""

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.lists import is_background, nfc, read_text, real_classes, refuse_hidden, strip_suffix
from utils.build import suggest
from utils.files import write_csv
from utils.npy_dictionary import read_npy_dictionary
from utils.problems import problem

# What a header calls the column of image names (in any case, with spaces or _), and columns of tags.
IMAGE_WORDS = (
    "name", "image", "imagename", "imageid", "photo", "picture", "file", "filename", "path", "id", "",
)  # fmt: skip
TAG_WORDS = {"tag", "tags", "label", "labels", "class", "classes"}
FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
SPLIT_WORDS = {"val", "valid", "validation", "test", "testing", "trainval", "training"}
FLAG_LIKE = {*FLAGS, "-1", "-1.0", "yes", "no", "y", "n", "x"}


class Entry(NamedTuple):
    """One image of a tags file, or (image None) the header of a table, which only names classes."""

    image: str | None
    tags: list[tuple[str, str]]  # word and place ("file, line 3, column 2")
    place: str


def read_tags(path: str | Path, class_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Image name, without the suffix of an image file -> class ids in ascending order, () without objects.

    Args:
        class_names: background and then the classes; position k is class id k.
    """
    class_id = {name: k for k, name in real_classes(class_names).items() if k > 0}
    tags: dict[str, tuple[int, ...]] = {}
    for image, words, place in tag_entries(path, class_names):
        for word, where in words:
            if is_background(word):
                problem(ValueError(f"{where}: an image without objects has no tags, not '{word}'"))
            elif word not in class_id:
                problem(ValueError(f"{where}: '{word}' is not a class{suggest(word, class_id)}"))
        if image in tags:
            problem(ValueError(f"{place}: image '{image}' appears twice"))
        elif image is not None:
            tags[image] = tuple(sorted({class_id[word] for word, _ in words if word in class_id}))
    return tags


def split_tags(text: str) -> list[str]:
    """The tags in ``dog;person``."""
    return [word.strip() for word in text.split(";") if word.strip()]


def classes_of(path: Path) -> list[str]:
    """The classes that a tags file speaks of, sorted; words that would be classes by mistake are errors."""
    place_of: dict[str, str] = {}
    header: set[str] = set()
    for image, words, _ in tag_entries(path):
        for word, place in words:
            place_of.setdefault(word, place)
            header |= {word} if image is None else set()
    words = sorted(word for word in place_of if not is_background(word))  # `read_tags` refuses background
    if not words:
        raise ValueError(f"no image in {path} has a tag")
    numbers = [word for word in words if word.replace(".", "").isdecimal()]
    alike: dict[str, str] = {}
    for word in words:
        parts = word.split()
        if set(word) & set(',|[]{}"') or (len(parts) > 1 and set(parts) <= set(words)):
            problem(ValueError(f"{place_of[word]}: '{word}' looks like several tags: separate them by ';'"))
        if word not in header and (word.lower() in SPLIT_WORDS or (word in numbers and words != numbers)):
            advice = "remove that column, or name the classes with data.options.class_names"
            problem(ValueError(f"{place_of[word]}: '{word}' is hardly a class: {advice}"))
        if (other := alike.setdefault(word.casefold(), word)) != word:
            how = f"'{word}' differs from '{other}' only in case: use one spelling"
            problem(ValueError(f"{place_of[word]}: {how}"))
    return words


def near_duplicates(words: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes that differ by one letter, of words of more than three. A digit is no letter."""
    sharing: dict[str, list[int]] = {}
    for k, word in enumerate(words):
        for slip in _slips(word):
            sharing.setdefault(slip, []).append(k)
    pairs = {pair for alike in sharing.values() for pair in itertools.combinations(alike, 2)}
    found = [(words[i], words[k]) for i, k in sorted(pairs)]
    numberless = str.maketrans("", "", "0123456789")
    return [
        (first, second)
        for first, second in found
        if max(len(first), len(second)) > 3 and first.translate(numberless) != second.translate(numberless)
    ]


def write_tags(path: str | Path, tags: Mapping[str, Sequence[str]]) -> None:
    """Write image name -> class names as CSV; complete at every moment."""
    write_csv(Path(path), [("name", "tags"), *((name, ";".join(words)) for name, words in tags.items())])


def tag_entries(path: str | Path, class_names: Sequence[str] = ()) -> list[Entry]:
    """The entries of a tags file in its order; ``class_names`` are needed for ``.npy`` alone."""
    path = Path(path)
    if not path.is_file():
        is_prepared = (path.parent / "ImageSets").is_dir()
        made = "make it with tools/prepare_voc.py or tools/prepare_coco.py, " if is_prepared else ""
        raise FileNotFoundError(f"tags file {path} is missing: {made}write it, or set data.options.tags")
    readers = {".csv": _csv, ".json": _json, ".txt": _txt, ".npy": _npy}
    if path.suffix.lower() not in readers:
        raise ValueError(f"tags file {path} must be one of {' '.join(readers)} (docs/data.md)")
    entries = []
    for image, words, place in readers[path.suffix.lower()](path, class_names):
        if image == "":
            raise ValueError(f"{place}: the image name is missing")
        for text, where in [(image or "-", place), *words]:
            refuse_hidden(text, where)
        entries.append(Entry(image and nfc(image), [(nfc(word), where) for word, where in words], place))
    words = {word.lower() for _, words, _ in entries for word, _ in words}
    if words and words <= FLAG_LIKE and not FLAG_LIKE & set(class_names):
        raise ValueError(
            f"{path}: every tag is one of {', '.join(sorted(words))}: a table needs a header; if these are "
            "classes, name them in data.options.class_names"
        )
    return entries


def _csv(path: Path, class_names: Sequence[str]) -> Iterator[Entry]:
    text = read_text(path)
    if "\t" in text.partition("\n")[0]:
        raise ValueError(f"{path}: commas or semicolons separate columns, not tabs: save it as CSV")
    first = next((line for line in text.splitlines() if "," in line or ";" in line), "")
    reader = csv.reader(
        io.StringIO(text, newline=None),
        delimiter=";" if ";" in first.partition(",")[0] else ",",
        skipinitialspace=True,
    )
    try:
        lines = [(f"{path}, line {reader.line_num}", _cells(row)) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    lines = [(place, cells) for place, cells in lines if cells and cells != ["sep="]]  # Excel's own line
    if not lines:
        return
    place, (image, *columns) = lines[0]
    has_flags = any(cell.lower() in FLAGS for _, cells in lines[1:] for cell in cells[1:])
    if image.lower().replace(" ", "").replace("_", "") not in IMAGE_WORDS:
        _refuse_header(place, lines[0][1], [cells for _, cells in lines[1:]])
        columns = []
    elif columns and columns[0].lower() not in TAG_WORDS and (len(columns) > 1 or has_flags):
        yield from _table(place, columns, lines[1:])
        return
    else:
        lines = lines[1:]
    for k, column in enumerate(columns[1:], start=3):
        if column.lower() not in TAG_WORDS:
            raise ValueError(f"{place}, column {k}: '{column}' is no column of tags: remove it")
    for place, (image, *cells) in lines:
        words = ((k, word) for k, cell in enumerate(cells, start=2) for word in split_tags(cell))
        tags = [(word, f"{place}, column {k}") for k, word in words]
        yield Entry(strip_suffix(image), tags, place)


def _table(header: str, columns: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> Iterator[Entry]:
    """A table with a column of 0 and 1 for each class, its header first."""
    if "" in columns or len(set(columns)) < len(columns):
        raise ValueError(f"{header}: every column needs a class of its own, got {', '.join(columns)}")
    yield Entry(None, [(name, f"{header}, column {k}") for k, name in enumerate(columns, start=2)], header)
    for place, (image, *cells) in rows:
        cells += [""] * (len(columns) - len(cells))
        if len(cells) > len(columns):
            raise ValueError(f"{place}: {len(cells)} values, but {header} names {len(columns)} classes")
        present = []
        for k, (column, cell) in enumerate(zip(columns, cells), start=2):
            if not cell:
                problem(ValueError(f"{place}, column {k}: class '{column}' is empty: write 0 or 1"))
            elif cell.lower() not in FLAGS:
                what = f"'{cell}' in the column of class '{column}' is neither 0 nor 1"
                advice = "(a column that holds tags is called 'tags')"
                problem(ValueError(f"{place}, column {k}: {what} {advice}"))
            elif FLAGS[cell.lower()]:
                present.append((column, f"{place}, column {k}"))
        yield Entry(strip_suffix(image), present, place)


def _refuse_header(place: str, first: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Raise a ValueError if a first line without a known heading is not an image as the lines below are."""
    headings = {cell.lower() for cell in first[1:]}
    if strip_suffix(first[0]) != first[0] or not headings or not rows:
        return
    values = {cell.lower() for cells in rows for cell in cells[1:] if cell}
    is_table = values and values <= FLAGS.keys() and not headings & FLAGS.keys()
    names_differ = all(strip_suffix(cells[0]) != cells[0] for cells in rows)
    if is_table or names_differ or headings & TAG_WORDS:
        known = ", ".join(filter(None, IMAGE_WORDS))
        raise ValueError(f"{place} looks like a header: its first heading must be one of {known}")


def _cells(row: Sequence[str]) -> list[str]:
    """Cells without the empty ones at the end, which spreadsheets add."""
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _json(path: Path, class_names: Sequence[str]) -> Iterator[Entry]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"{path}: image '{twice[0]}' appears twice")
        return dict(pairs)

    try:
        content = json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map image names to lists of tags, not be a {type(content).__name__}")
    for image, words in content.items():
        place = f"{path}, image '{image}'"
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"{place}: tags must be a list of class names, not {words!r}")
        yield Entry(strip_suffix(image.strip()), [(word.strip(), place) for word in words], place)


def _txt(path: Path, class_names: Sequence[str]) -> Iterator[Entry]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        place = f"{path}, line {number}"
        refuse_hidden(line, place)
        if words := line.split():
            tags = [(word, f"{place}, word {k}") for k, word in enumerate(words[1:], start=2)]
            yield Entry(strip_suffix(words[0]), tags, place)


def _npy(path: Path, class_names: Sequence[str]) -> Iterator[Entry]:
    if not class_names:
        raise ValueError(f"{path} has no class names: set data.options.class_names")
    _, *classes = real_classes(class_names).values()
    for key, values in read_npy_dictionary(path).items():
        # IRN writes VOC's 2007_000032 as a whole number.
        name = f"{key // 10**6}_{key % 10**6:06d}" if isinstance(key, (int, np.integer)) else str(key)
        place, vector = f"{path}, image '{name}'", np.asarray(values).ravel()
        if len(vector) != len(classes) or not np.isin(vector, (0, 1)).all():
            raise ValueError(f"{place}: expected 0 or 1 for {len(classes)} classes, got {vector}")
        yield Entry(strip_suffix(name), [(classes[k], place) for k in np.flatnonzero(vector)], place)


def _slips(word: str) -> set[str]:
    """The word without one of its letters: words that differ by one letter have one of these in common."""
    return {word, *(word[:k] + word[k + 1 :] for k in range(len(word)))}
