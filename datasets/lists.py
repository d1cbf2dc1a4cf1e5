"""The text around a data set: lists of names, class names, image tags, and which file belongs to a name.

C: foreground classes; class ids 1..C are the values that masks hold, 0 is background.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.files import write_atomic
from utils.image import IGNORE_INDEX
from utils.npy_dictionary import read_npy_dictionary

Entry = tuple[str | None, list[str], str]  # of a tags file; see `tag_words`

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2")

_HEADER_WORDS = {
    "name",
    "image",
    "image_name",
    "imagename",
    "image_id",
    "filename",
    "file_name",
    "file",
    "id",
    "path",
}
# What a header calls the column of the tags themselves; that of a table names the classes.
_TAG_WORDS = {"tag", "tags", "label", "labels", "class", "classes"}
_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: if it is not UTF-8; names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def read_list(path: str | Path, whole_lines: bool = False) -> list[str]:
    """Image names of a list file, one per line.

    Understands the forms that are about: ``2007_000032``, ``2007_000032 1`` and
    ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png``; blank lines are passed over. With
    ``whole_lines`` a line is a name, spaces included.

    Raises:
        FileNotFoundError: no such list.
        ValueError: an empty list, or a name that occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"list {path} is missing; lists in that folder: {', '.join(there) or 'none'} (docs/data.md)"
        )
    names = []
    for line in read_utf8(path).splitlines():
        words = [line.strip()] if whole_lines else line.split()
        if words and words[0]:
            names.append(
                Path(strip_suffix(words[0])).name if words[0].startswith("/") else strip_suffix(words[0])
            )
    if not names:
        raise ValueError(f"list {path} is empty")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"list {path} names {some(twice, len(names), 'images')} more than once")
    return names


def find_list(root: Path, lists: str, split: str) -> Path:
    """The list file of a split: its name below ``root/lists``, or the path of a text file of one's own."""
    if split.endswith(".txt"):
        return Path(split) if Path(split).is_file() else root / split
    return root / lists / f"{split}.txt"


def read_class_names(
    source: str | Sequence[str] | None, root: Path, default: Sequence[str]
) -> tuple[str, ...]:
    """Class names, background first, from a file (line k names mask value k), a sequence or a default.

    ``background`` is put in front where it is left out, and replaces another spelling of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names that would give a class another mask value than its line says (a blank line,
        background in another place than the first), that are not unique, or too many.
    """
    where = "class names"
    if source is None:
        names = list(default)
    elif isinstance(source, str):
        path = root / source
        if not root.is_dir():
            raise FileNotFoundError(f"there is no data set folder {root}: see docs/data.md, or set data.root")
        if not path.is_file():
            raise FileNotFoundError(
                f"class names {path} are missing: write one name per line, or correct "
                "data.options.class_names"
            )
        where = f"class names {path}"
        names = [line.strip() for line in read_utf8(path).rstrip().splitlines()]
        if "" in names:
            raise ValueError(
                f"{where}: line {names.index('') + 1} is blank, but line k names mask value k: remove it, or "
                "name the class of that value"
            )
    else:
        names = [str(name) for name in source]
    for place, name in enumerate(names[1:], start=2):
        if is_background(name):
            raise ValueError(
                f"{where}: '{name}' is name {place}, but background is mask value 0: put it first, or leave "
                "it out"
            )
    if names and is_background(names[0]):
        del names[0]
    names.insert(0, "background")
    if len(set(names)) < len(names):
        raise ValueError(
            f"class names are not unique: {', '.join(name for name in set(names) if names.count(name) > 1)}"
        )
    if len(names) > IGNORE_INDEX:
        raise ValueError(
            f"{len(names)} classes do not fit into 8-bit masks (at most {IGNORE_INDEX} with background)"
        )
    return tuple(names)


def is_background(name: str) -> bool:
    """Whether a name is one of the spellings of background, such as labelme's ``_background_``."""
    return name.replace("_", "").lower() in ("background", "bg")


def read_tags(path: str | Path, class_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read image tags: image name -> class ids in ascending order, () for an image without objects.

    By suffix of the file: ``.csv`` (``name,tags`` with a header or without; tags separated by ``;``, or by
    spaces where the file has no ``;``; or ``name;tags``, tags separated by ``;``, ``,`` or spaces; or a table
    with a column of 0 and 1 for each class, named in its first line), ``.json`` (``{name: [tag, ...]}``),
    ``.npy`` (the dictionary name -> multi-hot vector over the foreground classes of other programs), anything
    else is text (``name tag tag ...`` per line). Image names may carry a suffix such as ``.jpg``; it is
    dropped.

    Args:
        path: the file.
        class_names: background and then the classes; position k is class id k.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown tag (with file, line and the closest class), an image named twice, a file of
        another form.
    """
    class_id = {name: k for k, name in enumerate(class_names) if k > 0}
    tags: dict[str, tuple[int, ...]] = {}
    for name, words, where in tag_words(path, class_names):
        if name in tags:
            raise ValueError(f"{where}: image '{name}' is named a second time")
        for word in words:
            if word not in class_id:
                raise ValueError(f"{where}: '{word}' is not a class{_closest(word, list(class_id))}")
        if name is not None:
            tags[name] = tuple(sorted({class_id[word] for word in words}))
    return tags


def tag_words(path: str | Path, class_names: Sequence[str] = ()) -> Sequence[Entry]:
    """Image name, tag words and place ("file, line 3") of each entry of a tags file; see `read_tags`.

    The header of a table is an entry without image name: its words are classes, whether an image has them or
    not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"tags file {path} is missing (docs/data.md says how to make it), or data.options.tags is wrong"
        )
    if path.suffix.lower() == ".npy":
        return _npy_tags(path, class_names)
    text = read_utf8(path)
    if path.suffix.lower() == ".json":
        return _json_tags(path, text)
    if path.suffix.lower() == ".csv":
        entries = _csv_tags(path, text, set(class_names))
    else:
        lines = enumerate((line.split() for line in text.splitlines()), start=1)
        entries = [(strip_suffix(words[0]), words[1:], f"{path}, line {k}") for k, words in lines if words]
    _refuse_flags(path, entries, class_names)
    return entries


def write_tags(path: str | Path, tags: Mapping[str, Sequence[str]]) -> None:
    """Write image name -> class names as a CSV file that `read_tags` reads; complete at every moment."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "tags"])
    # The closing ';' of a single tag keeps class names with a space in one piece.
    writer.writerows(
        [name, ";".join(words) + (";" if len(words) == 1 else "")] for name, words in tags.items()
    )
    write_atomic(Path(path), text.getvalue().encode())


def _npy_tags(path: Path, class_names: Sequence[str]) -> list[Entry]:
    entries: list[Entry] = []
    for name, vector in read_npy_dictionary(path).items():
        name = str(name)
        if name.isdigit() and len(name) == 10:  # 2007000032, how IRN writes VOC's 2007_000032
            name = f"{name[:4]}_{name[4:]}"
        where, present = f"{path}, '{name}'", np.asarray(vector).ravel()
        if len(present) != len(class_names) - 1:
            raise ValueError(f"{where}: {len(present)} values, but there are {len(class_names) - 1} classes")
        entries.append((name, [class_names[k + 1] for k in np.flatnonzero(present > 0)], where))
    return entries


def _csv_tags(path: Path, text: str, class_names: set[str]) -> list[Entry]:
    lines = _csv_lines(text, ",")
    # No name holds a ';': it stands between the columns, as spreadsheets in Europe write them.
    is_european = any(";" in row[0] for _, row in lines)
    if is_european:
        lines = _csv_lines(text, ";")
    if lines and (table := _csv_table(path, lines, class_names)):
        return table
    rows = lines[1:] if lines and lines[0][1][0].lower() in _HEADER_WORDS else lines
    if is_european:
        # A cell that holds several tags has become one in quotes.
        rows = [
            (line, [row[0], *(part for cell in row[1:] for part in cell.split(";"))]) for line, row in rows
        ]
    cells = [cell for _, row in rows for cell in row[1:]]
    separator = None  # spaces
    if any(";" in cell for cell in cells):
        separator = ";"
    elif any("," in cell for cell in cells) or any(any(row[2:]) for _, row in rows):
        separator = ","  # in a cell in quotes, or between the columns
    if separator is None and not class_names:
        _refuse_torn_names(path, [" ".join(row[1:]).split() for _, row in rows])

    def words(cell: str) -> list[str]:
        parts = [cell] if cell in class_names else cell.split(separator)
        return [part.strip() for part in parts if part.strip()]

    return [
        (strip_suffix(row[0]), [word for cell in row[1:] for word in words(cell)], f"{path}, line {line}")
        for line, row in rows
    ]


def _csv_lines(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Number and cells of each line that holds something."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    return [(line, row) for line, row in rows if any(row)]


def _csv_table(path: Path, lines: Sequence[tuple[int, list[str]]], class_names: set[str]) -> list[Entry]:
    """Entries of a table with a column of 0 and 1 for each class, the header among them; [] if it is none.

    It is one if its first line names columns, and any other line holds nothing but 0 and 1 in them.
    """
    (header, (_, *columns)), *rows = lines
    while columns and not columns[-1]:  # the line ends with a delimiter
        columns.pop()
    width = len(columns)
    has_names = all(columns) and _TAG_WORDS.isdisjoint(column.lower() for column in columns)
    if not columns or not has_names or any(map(_is_flag, [*columns, *class_names])):
        return []
    if not any(len(row) > width and all(map(_is_flag, row[1 : width + 1])) for _, row in rows):
        return []
    entries: list[Entry] = [(None, columns, f"{path}, line {header}")]
    for line, (name, *cells) in rows:
        where = f"{path}, line {line}"
        if len(cells) < width or any(cells[width:]):
            raise ValueError(f"{where}: {len(cells)} values, but line {header} names {width} classes")
        for column, cell in zip(columns, cells):
            if not _is_flag(cell):
                raise ValueError(
                    f"{where}: '{cell}' in the column of class '{column}' is neither 0 nor 1 (a column that "
                    "holds tags is called 'tags')"
                )
        present = [column for column, cell in zip(columns, cells) if _FLAGS[cell.lower()]]
        entries.append((strip_suffix(name), present, where))
    return entries


def _is_flag(word: str) -> bool:
    return word.lower() in _FLAGS


def _refuse_flags(path: Path, entries: Sequence[Entry], class_names: Sequence[str]) -> None:
    """Raise a ValueError where every tag is 0 or 1 and no class is called so: a table without its header."""
    found = {word for _, words, _ in entries for word in words}
    if found and all(map(_is_flag, found)) and not any(map(_is_flag, class_names)):
        raise ValueError(
            f"{path}: every tag is {' or '.join(sorted(found))}. A table with a column of 0 and 1 for each "
            "class is a .csv file whose first line names the classes (image,cat,dog); classes that are "
            "called so stand in data.options.class_names"
        )


def _refuse_torn_names(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Raise a ValueError where spaces seem to tear a class name such as ``potted plant`` into two tags."""
    lines_of: dict[str, set[int]] = {}
    pairs: dict[tuple[str, str], set[int]] = {}
    for line, words in enumerate(rows):
        for word in words:
            lines_of.setdefault(word, set()).add(line)
        for pair in itertools.pairwise(words):
            pairs.setdefault(pair, set()).add(line)
    for (first, second), lines in pairs.items():
        is_name = not (_is_flag(first) and _is_flag(second))  # for those see `_refuse_flags`
        if is_name and len(lines) > 1 and lines == lines_of[first] == lines_of[second]:
            raise ValueError(
                f"{path}: '{first} {second}' always stand together. If it is one tag, write it as "
                f"'{first} {second};', if there are two, as '{first};{second}': spaces separate tags only in "
                "a file without any ';'. Or name the classes in data.options.class_names"
            )


def _json_tags(path: Path, text: str) -> list[Entry]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must be a mapping of image names to lists of tags, not a {type(content).__name__}"
        )
    for name, words in content.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{path}, image '{name}': tags must be a list of class names, not {words!r}")
    return [(strip_suffix(name), words, f"{path}, image '{name}'") for name, words in content.items()]


def strip_suffix(name: str) -> str:
    """An image's name without the suffix of an image file; other dots stay."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def file_of(root: Path, place: str, name: str, suffix: str) -> Path:
    """Path of an image's file below ``root``.

    ``place`` is a folder of ``<name><suffix>``, or a pattern such as ``masks/{name}.png``, in which
    ``{name}`` is the image's name, ``{part}`` is ``train``, ``val`` or ``test`` as found in the name, and
    ``{number}`` what follows its last underscore.
    """
    part = next((part for part in ("train", "val", "test") if part in name), "")
    if "{name}" not in place and "{number}" not in place:
        place = f"{place}/{{name}}{suffix}"
    return root / place.replace("{part}", part).replace("{number}", name.rpartition("_")[2]).replace(
        "{name}", name
    )


def some(names: Sequence[str], total: int, what: str) -> str:
    """How many of how many, and which the first ones are: "4 of 10 images (a, b, c, ...)"."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} of {total} {what} ({shown})"


def _closest(word: str, known: Sequence[str]) -> str:
    if is_background(word):
        return ": leave the tags of an image without objects empty (and that column out of a table)"
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.0) or list(known)[:1]
    return f": did you mean '{match[0]}'?" if match else ""
