"""Annotations of other programs into a data set of one's own, and masks into their formats (docs/data.md).

    python tools/convert_data.py --read coco --source instances.json --images photos --out data/custom
    python tools/convert_data.py --read folders --source photos --out data/custom
    python tools/convert_data.py --write yolo --source masks --names data/custom/class_names.txt --out yolo

Reading writes ``tags.csv``, ``class_names.txt``, ``masks/`` where all objects have shapes, and a link
``images``. Writing takes a folder of masks; ignored pixels (255) belong to no object.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

READ = ("coco", "voc", "labelme", "yolo", "folders")
WRITE = ("coco", "yolo", "voc")


@dataclass(kw_only=True)
class Options:
    read: str | None = option(None, "format of annotations that become a data set", choices=READ)
    write: str | None = option(None, "format that masks are written in", choices=WRITE)
    source: Path = option(meaning="file or folder of annotations; with --write folder of masks", reads=True)
    images: Path | None = option(None, "folder of the images; default: the source", reads=True)
    names: Path | None = option(None, "class names: YOLO's data.yaml, or a name on each line", reads=True)
    out: Path = option(meaning="folder for what is written")

    def __post_init__(self) -> None:
        if bool(self.read) == bool(self.write):
            raise ValueError("say either --read FORMAT or --write FORMAT")
        if self.names is None and (self.write in ("coco", "yolo") or self.read == "yolo"):
            raise ValueError(f"{self.read or self.write} needs the class names: set --names")


def run(options: Options) -> Path:
    """Convert; returns the folder that was written."""
    if options.write:
        export(options)
    else:
        adopt(options)
    return options.out


def adopt(options: Options) -> None:
    """Write tags, class names and masks of annotations."""
    from datasets import convert
    from datasets.custom import find_images
    from datasets.lists import some, with_hole
    from datasets.tags import write_tags
    from utils.files import write_atomic
    from utils.image import picture_size, write_mask
    from utils.logging import progress_bar

    folder = options.images or (options.source if options.source.is_dir() else options.source.parent)
    files = find_images(folder)
    sizes = {name: picture_size(path)[::-1] for name, path in files.items()}
    if options.read == "yolo":
        assert options.names
        names, found = convert.from_yolo(options.source, sizes, convert.yolo_names(options.names))
    else:
        names, found = getattr(convert, f"from_{options.read}")(options.source, sizes)
    if missing := [name for name in found if name not in files]:
        raise FileNotFoundError(f"{some(missing, len(found), 'annotated images')} are not in {folder}")
    images = options.out / "images"
    if not images.exists():
        images.parent.mkdir(parents=True, exist_ok=True)
        images.symlink_to(folder.absolute())
    classes = with_hole(["background", *names])
    write_atomic(options.out / "class_names.txt", "".join(f"{name}\n" for name in classes).encode())
    # COCO and YOLO leave images without objects out, or give them an empty file.
    tags = {name: [w for w in names if w in found[name].words] for name in files if name in found}
    write_tags(options.out / "tags.csv", tags)
    with_masks = all(image.has_shapes for image in found.values())
    if with_masks:
        for name, image in progress_bar(found.items(), desc="masks", unit="image"):
            write_mask(options.out / "masks" / f"{name}.png", image.mask(sizes[name], classes))
    masks = "masks" if with_masks else "no masks, because some objects have no shape"
    left = len(files) - len(tags)
    more = f"; {left} images have no annotation (data.options.untagged)" if left else ""
    print(f"{options.out}: {len(tags)} images with tags of {len(names)} classes, {masks}{more}")


def export(options: Options) -> None:
    """Write masks in another format."""
    import yaml

    from datasets import convert
    from datasets.custom import find_images
    from datasets.lists import read_class_names, real_classes
    from utils.files import write_atomic, write_json
    from utils.image import IGNORE_INDEX, read_mask, write_mask
    from utils.logging import progress_bar

    paths = sorted(path for path in options.source.rglob("*.png") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"there is no mask (.png) in {options.source}")
    names = {path: path.relative_to(options.source) for path in paths}
    bar = progress_bar(paths, desc="masks", unit="image")
    if options.write == "voc":
        for path in bar:
            mask = read_mask(path)
            if mask.max(initial=0) > IGNORE_INDEX:
                raise ValueError(f"{path} has class {mask.max()}, palettes end at 254. Write coco or yolo")
            write_mask(options.out / names[path], mask)
        return
    classes = read_class_names(str(options.names and options.names.absolute()), Path("/"), ())
    if options.write == "yolo":
        for path in bar:
            text = convert.yolo_of(read_mask(path))
            write_atomic((options.out / names[path]).with_suffix(".txt"), text.encode())
        _, *words = real_classes(classes).values()
        content = yaml.safe_dump({"names": dict(enumerate(words))}, allow_unicode=True)
        write_atomic(options.out / "data.yaml", content.encode())
        return
    files: dict[str, str] = {}
    if options.images:
        found = find_images(options.images)
        files = {name: path.relative_to(options.images).as_posix() for name, path in found.items()}
    stems = {path: names[path].with_suffix("").as_posix() for path in paths}
    masks = ((files.get(stems[path], f"{stems[path]}.jpg"), read_mask(path)) for path in bar)
    write_json(options.out / "instances.json", convert.coco_of(masks, classes))


if __name__ == "__main__":
    command_line(Options, run, __doc__)
