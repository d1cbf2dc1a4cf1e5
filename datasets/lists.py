"""The text around a data set: lists of names, class names, and which file belongs to a name."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.pictures import IMAGE_SUFFIXES
from utils.image import IGNORE_INDEX, MAX_CLASS

HOLE = "(ignored)"  # what class 255 is called, for the pixels of this value are ignored


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its byte order mark; accents in one spelling (NFC)."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    return nfc(text)


def nfc(text: str) -> str:
    """Text with accents in one spelling; Apple's file names write an accent as a character of its own."""
    return unicodedata.normalize("NFC", text)


def read_list(path: str | Path, whole_lines: bool = False) -> dict[str, str]:
    """Image names of a list file, one per line, and what the line says; no name occurs twice.

    ``2007_000032``, ``2007_000032.jpg``, ``2007_000032 1`` and the field's ``/JPEGImages/2007_000032.jpg
    /SegmentationClassAug/2007_000032.png`` (see `check_paths`) name an image. With ``whole_lines`` a line is
    a name, spaces included.
    """
    path = Path(path)
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"list {path} is missing (data.root, docs/data.md); lists there: {there}")
    lines = (line.strip() if whole_lines else line.partition(" ")[0] for line in read_text(path).splitlines())
    words = [word for line in lines if (word := line.strip())]
    for word in words:
        refuse_hidden(word, f"list {path}")
    names = [strip_suffix(Path(word).name if word.startswith("/") else word) for word in words]
    if not names:
        raise ValueError(f"list {path} is empty")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"list {path} names {some(twice, len(names), 'images')} more than once")
    return dict(zip(names, words, strict=True))


def check_paths(path: Path, listed: Mapping[str, str], root: Path, files: Mapping[str, Path]) -> None:
    """Refuse a list that says a path where the data set has another image of that name.

    Args:
        listed: of `read_list`; paths count from the data set's folder ``root`` or from that of the machine.
        files: image of each name.
    """
    for name, word in listed.items():
        meant = (root / word[1:], Path(word))
        if word.startswith("/") and not any(file.exists() and file.samefile(files[name]) for file in meant):
            raise ValueError(f"list {path} names {word}, not {files[name]}: write names (photos: --infer)")


def find_list(root: Path, lists: str, split: str) -> Path:
    """The list file of a split: its name below ``root/lists``, or the path of a text file of one's own."""
    if split.endswith(".txt"):
        return Path(split) if Path(split).is_file() else root / split
    return root / lists / f"{split}.txt"


def read_class_names(
    source: str | Sequence[str] | None, root: Path, default: Sequence[str]
) -> tuple[str, ...]:
    """Class names by mask value, from a file of one name on each line, a sequence or a default.

    ``background`` is put in front where it is left out, and replaces another spelling of it. Of more than 254
    classes the further ones have the mask values from 256 on (`with_hole`).
    """
    where, names = "class names", list(default if source is None else source)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{where}: {wrong[0]!r} is no text to YAML: write it in quotes")
    if isinstance(source, str):
        path = root / source
        if not path.is_file():
            raise FileNotFoundError(f"class names {path} are missing: mend data.options.class_names")
        where, names = f"class names {path}", read_text(path).rstrip().splitlines()
    names = [nfc(name).strip() for name in names]
    for line, name in enumerate(names, start=1):
        refuse_hidden(name, f"{where}, line {line}")
        if not name or (line > 1 and is_background(name)):
            raise ValueError(f"{where}: line {line} is '{name}', but every line names a class")
    names = ["background", *(names[1:] if names and is_background(names[0]) else names)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where} are not unique: {', '.join(twice)}")
    names = with_hole(names)
    if HOLE in real_classes(names).values():
        raise ValueError(f"{where}: no class can be called '{HOLE}', as mask value {IGNORE_INDEX} is")
    if len(names) > MAX_CLASS + 1:
        raise ValueError(f"{where}: {len(names) - 2} classes are too many (at most {MAX_CLASS - 1})")
    return tuple(names)


def with_hole(names: Sequence[Any]) -> list[Any]:
    """Class names, background first, with ``HOLE`` in the place of class 255 if there are as many."""
    hole = [HOLE] if len(names) > IGNORE_INDEX and names[IGNORE_INDEX] != HOLE else []
    return [*names[:IGNORE_INDEX], *hole, *names[IGNORE_INDEX:]]


def real_classes(class_names: Sequence[str]) -> dict[int, str]:
    """Mask value -> name of background and all classes, without ``HOLE``."""
    return {k: name for k, name in enumerate(class_names) if k != IGNORE_INDEX}


def is_background(name: str) -> bool:
    """Whether a name is one of the spellings of background, such as labelme's ``_background_``."""
    return name.replace("_", "").lower() in ("background", "bg")


def refuse_hidden(text: str, place: str) -> None:
    """Raise a ValueError for ``..`` in a path and for characters that nobody sees (NUL, tab, zero-width)."""
    for k, character in enumerate("" if text.isprintable() else text, start=1):
        if unicodedata.category(character) in ("Cc", "Cf"):
            name = "a tab" if character == "\t" else unicodedata.name(character, "a control character")
            raise ValueError(f"{place}: character {k} of {text!r} is {name} (U+{ord(character):04X})")
    if ".." in text.split("/"):
        raise ValueError(f"{place}: '{text}' leaves its folder")


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
    place = place.replace("{part}", part).replace("{number}", name.rpartition("_")[2])
    return root / place.replace("{name}", name)


def check_counts(counts: Mapping[str, int], expected: Mapping[str, int], what: str, accept: bool) -> None:
    """Print how many images the lists of a data set have; other numbers are an error unless accepted."""
    wrong = []
    for split, count in counts.items():
        verdict = "as expected" if count == expected[split] else f"EXPECTED {expected[split]}"
        print(f"{split:<9} {count:>6} images, {verdict}")
        if count != expected[split]:
            wrong.append(f"{split} {count} instead of {expected[split]}")
    if wrong and not accept:
        shown = ", ".join(wrong)
        raise ValueError(f"incomplete {what}: {shown}; unpack the rest, or accept it with --any_counts")


def some(names: Sequence[str], total: int, what: str) -> str:
    """How many of how many, and which the first ones are: "4 of 10 images (a, b, c, ...)"."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} of {total} {what} ({shown})"
