"""One's own images: a folder of pictures and one file of tags; masks only if there is something to score."""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from datasets.base import Record, Split
from datasets.lists import check_paths, find_list, nfc, read_class_names, read_list, refuse_hidden, some
from datasets.pictures import IMAGE_SUFFIXES, picture_files
from datasets.tags import classes_of, read_tags
from utils.build import check_choice
from utils.problems import problem

UNTAGGED = ("error", "no_object", "leave_out", "unknown")


def custom_split(
    root: str | Path,
    split: str,
    *,
    lists: str | None = None,
    images: str = "images",
    masks: str | None = None,
    tags: str | None = "tags.csv",
    class_names: str | Sequence[str] | None = None,
    val_fraction: float = 0.1,
    group: str | None = None,
    untagged: str = "error",
) -> Split:
    """One split of a folder of images with tags.

    An image is called after its path below the image folder, without the suffix (``cats/0001``); tags and
    lists may use the file's own name where only one image has it. A hash of the name decides between
    ``train`` and ``val``, so an image stays in its split when others are added.

    Args:
        root: folder of the data set.
        split: ``train``, ``val`` or ``all``; with ``lists`` the name of a list; or the path of a text file of
            names.
        lists: folder of the lists, below root; null: train and val are made by ``val_fraction``.
        images: folder of the images, below root; all formats that Pillow reads, subfolders included.
        masks: folder of the PNG masks, below root; null: there are none.
        tags: file of image tags (CSV, JSON or text), below root; null: tags are unknown (inference only).
        class_names: file below root whose line k names mask value k, or a list; null: the tags' words,
            sorted.
        val_fraction: share of the images in ``val`` where there are no lists.
        group: regular expression for the start of a name: images for which it finds the same text, such as
            tiles or frames of one recording, are in the same split. null: each image by itself.
        untagged: what an image does that the tags file does not name: ``error``, ``no_object`` (it shows no
            class), ``leave_out`` (it is in no split) or ``unknown`` (kept, for inference only).
    """
    root = Path(root)
    check_choice("data.options.untagged", untagged, UNTAGGED)
    if tags is None and class_names is None:
        raise ValueError("set data.options.tags or data.options.class_names: nothing else names the classes")
    words = classes_of(root / tags) if class_names is None and tags is not None else ()
    classes = read_class_names(class_names, root, words)
    files = find_images(root / images)
    aliases = aliases_of(files)
    known = _known_tags(root / tags, classes, aliases) if tags is not None else {}

    names = _names_of(root, split, lists, files, aliases, val_fraction, group)
    without = [name for name in names if name not in known]
    if without and tags is not None and untagged == "error":
        lacking = f"{some(without, len(names), 'images')} of split '{split}' are not in {tags}"
        problem(ValueError(f"{lacking}: add them, or set data.options.untagged=no_object or leave_out"))
    if untagged == "leave_out":
        names = [name for name in names if name in known]
    if not names:
        raise ValueError(f"split '{split}' has none of {len(files)} images: see data.options.val_fraction")
    is_own_list = split.endswith(".txt")  # for inference: images may lack ground truth
    default = () if tags is not None and untagged == "no_object" else None
    records = []
    for name in names:
        mask = None
        if masks:  # where the image is, in the spelling of the disk
            mask = root / masks / files[name].relative_to(root / images).with_suffix(".png")
            mask = None if is_own_list and not mask.is_file() else mask
        records.append(Record(name, files[name], mask, known.get(name, default)))
    return Split(Path(split).stem if is_own_list else split, classes, tuple(records))


def find_images(folder: Path, subfolders: bool = True) -> dict[str, Path]:
    """Image name -> file of every picture of a folder, sorted; a name is the path without the suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"image folder {folder} does not exist (data.root, data.options.images, --images)"
        )
    found: dict[str, list[Path]] = {}
    for path in picture_files(folder, subfolders):
        name = nfc(path.relative_to(folder).with_suffix("").as_posix())
        refuse_hidden(name, str(folder))
        found.setdefault(name, []).append(path)
    if not found:
        raise FileNotFoundError(f"no image in {folder} (suffixes: {' '.join(IMAGE_SUFFIXES)})")
    twice = [" and ".join(path.name for path in paths) for paths in found.values() if len(paths) > 1]
    if twice:
        raise ValueError(f"{some(twice, len(found), 'names')} in {folder} mean two files: rename one")
    return {name: paths[0] for name, paths in sorted(found.items())}


def _names_of(
    root: Path,
    split: str,
    lists: str | None,
    files: Mapping[str, Path],
    aliases: Mapping[str, str],
    val_fraction: float,
    group: str | None,
) -> list[str]:
    if lists is not None or split.endswith(".txt"):
        path = find_list(root, lists or "", split)
        listed = read_list(path, whole_lines=True)
        _refuse_unknown(path, listed, aliases)
        listed = {name: word for name, word in listed.items() if name in aliases}
        check_paths(path, listed, root, {name: files[aliases[name]] for name in listed})
        return [aliases[name] for name in listed]
    if split == "all":
        return list(files)
    if split not in ("train", "val"):
        raise ValueError(f"unknown split '{split}': use train, val or all, or set data.options.lists")
    # The same number in [0, 1) on every machine.
    uniform = {}
    for name in files:
        start = re.match(group, name) if group else None
        key = start[0] if start else name
        uniform[name] = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    return [name for name in files if (uniform[name] < val_fraction) == (split == "val")]


def aliases_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Every way to call an image -> its name: the name itself, and the file's own name if it is unique."""
    short = Counter(name.rpartition("/")[2] for name in files)
    unique = {alias: name for name in files if short[alias := name.rpartition("/")[2]] == 1}
    return unique | {name: name for name in files}


def _known_tags(path: Path, classes: Sequence[str], aliases: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    read = read_tags(path, classes)
    _refuse_unknown(path, read, aliases)
    known: dict[str, tuple[int, ...]] = {}
    for name, ids in read.items():
        if aliases.get(name) in known:
            problem(ValueError(f"{path}: image '{aliases[name]}' appears twice, also as '{name}'"))
        elif name in aliases:
            known[aliases[name]] = ids
    return known


def _refuse_unknown(path: Path, names: Collection[str], aliases: Mapping[str, str]) -> None:
    if missing := [name for name in names if name not in aliases]:
        lacking = f"{some(missing, len(names), 'images')} named in {path} are missing, or their short name is"
        advice = "mend the line, call a heading 'name', or write the path (cats/1.jpg)"
        problem(FileNotFoundError(f"{lacking} not unique: {advice}"))
