"""Inference over a data set: load a checkpoint, merge scales and mirror images, visit every image once.

Letters: K classes with background 0, H x W the output size, h x w the size at which the network sees an
image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

import datasets.coco
import datasets.voc
from datasets.base import Record, Split, WeakSegDataset
from datasets.lists import IMAGE_SUFFIXES
from datasets.loader import eval_loader
from engine.evaluator import resize, single
from engine.train import build_method
from methods.base import Method
from methods.published import recognise
from utils.build import suggest
from utils.checkpoint import FORMAT, load_checkpoint
from utils.config import load_config, to_plain
from utils.distributed import barrier, is_main, shard

Merge = Literal["sum", "max"]


class _Data(NamedTuple):
    config: str
    class_names: Sequence[str]


# What a published checkpoint was trained on, told by its number of classes with background.
DATA_OF_CLASSES = {
    21: _Data("datasets/voc.yaml", datasets.voc.CLASS_NAMES),
    81: _Data("datasets/coco.yaml", datasets.coco.CLASS_NAMES),
}


@dataclass
class LoadedMethod:
    """A method with trained weights, in eval mode, and what is known about it.

    Args:
        cfg: the config in its checkpoint with overrides applied; for published checkpoints the config that
            stands for them.
        class_names: name of every class, background first.
        source: ``tag2mask`` or the name of the published program.
        unmatched: keys of the file that the method has no place for, and keys that the file lacks.
    """

    method: Method
    cfg: DictConfig
    class_names: tuple[str, ...]
    path: Path
    sha256: str
    step: int | None
    source: str = "tag2mask"
    unmatched: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Lines that say what was loaded, every unmatched key among them."""
        step = "" if self.step is None else f", step {self.step}"
        lines = [
            f"model    {self.path} ({self.source}{step}, {len(self.class_names)} classes, "
            f"{self.cfg.method.target})"
        ]
        if self.source != "tag2mask" or self.unmatched:
            lines.append(
                f"         {len(self.unmatched)} unmatched keys"
                + ("" if self.unmatched else ": every key has its place")
            )
        return "\n".join([*lines, *(f"         {key}" for key in self.unmatched)])

    def provenance(self) -> dict[str, Any]:
        """What identifies the weights, for a score record."""
        return {
            "checkpoint": str(self.path),
            "checkpoint_sha256": self.sha256,
            "step": self.step,
            "source": self.source,
        }


def load_method(path: str | Path, device: torch.device | str, overrides: Sequence[str] = ()) -> LoadedMethod:
    """Build the method that a checkpoint belongs to and load its weights.

    Pretrained weights are not looked for: everything comes out of the checkpoint. Checkpoints of the authors'
    ToCo, MCC and SeCo programs are recognised by their key names and converted.

    Args:
        path: our checkpoint, or a published one (``module.`` prefix or not).
        overrides: ``key=value`` changes of the checkpoint's config, for example ``data.root=/data/VOC2012``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is of no known program, or does not fit its config.
        KeyError: an override names a key that the config does not have.
    """
    path = Path(path)
    state = load_checkpoint(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if state.get("format") == FORMAT:
        cfg = override_config(OmegaConf.create(state["config"]), overrides)
        method = build_method(cfg, len(state["class_names"]), pretrained=False)
        unmatched = _load_state(method, state["model"], path)
        loaded = LoadedMethod(
            method, cfg, tuple(state["class_names"]), path, digest, state.get("step"), unmatched=unmatched
        )
    else:
        loaded = _load_published(state, path, digest, overrides)
    loaded.method.to(device).eval().requires_grad_(False)
    return loaded


def multi_scale_segment(
    method: Method,
    image: Tensor,
    *,
    size: Literal["native"] | int = "native",
    scales: Sequence[float] = (1.0, 1.25, 1.5),
    flip: bool = True,
    merge_flips: Merge = "sum",
    merge_scales: Merge = "max",
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Segmentation logits of one image, merged over scales and mirror images.

    The image is brought to its base size, then to ``(int(s * h), int(s * w))`` for every scale; logits are
    resized to the output size, the mirrored ones turned back, the two merged, then the scales (all resizing
    bilinear, no corner alignment).

    Args:
        image: (1, 3, H, W) normalised.
        size: ``native``, or the side of the square that the image is resized to first.
        output_size: size of the result; None: that of ``image``.

    Returns:
        (1, K, *output_size) merged logits, float32. Only their order and their softmax mean anything: a sum
        of two is twice as sharp.
    """
    for name, value in (("merge_flips", merge_flips), ("merge_scales", merge_scales)):
        if value not in ("sum", "max"):
            raise ValueError(f"{name} is '{value}', not sum or max")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive numbers, not {list(scales)}")
    output_size = tuple(output_size or image.shape[-2:])
    base = image if size == "native" else resize(image, (size, size))
    h, w = base.shape[-2:]
    merged: Tensor | None = None
    # Merged as they come: memory holds two maps of logits, however many scales there are.
    for scale in scales:
        scaled = resize(base, (max(int(scale * h), 1), max(int(scale * w), 1)))
        views = torch.cat([scaled, scaled.flip(-1)]) if flip else scaled
        logits = resize(method.segment(views).float(), output_size)
        if flip:
            logits = _merge(logits[:1], logits[1:].flip(-1), merge_flips)
        merged = logits if merged is None else _merge(merged, logits, merge_scales)
    assert merged is not None
    return merged


def for_each_image(
    dataset: WeakSegDataset,
    work: Callable[[dict[str, Any]], None],
    *,
    finished: Callable[[Record], bool] | None = None,
    revisit: Callable[[Record], None] | None = None,
    num_workers: int = 0,
    text: str = "",
    progress: bool = True,
) -> int:
    """Call ``work(sample)`` once for every image of this process's share, with a progress bar that knows the
    time left.

    Args:
        work: gets a sample of the data set; its image is decoded by the loader's workers.
        finished: True for records whose result is there already; their image is not even read.
        revisit: called for those instead, for example to count them in a score.
        text: what the progress bar says.

    Returns:
        Number of images that ``work`` was called for in this process. All processes have arrived when it
        returns.
    """
    share = list(shard(len(dataset)))
    records = dataset.split.records
    # Asked before work starts: a result that appears meanwhile was made by this run.
    done = [i for i in share if finished is not None and finished(records[i])]
    left = sorted(set(share) - set(done))
    if revisit is not None:
        for i in tqdm(
            done,
            desc=f"{text} (finished before)",
            unit="img",
            leave=False,
            disable=not (progress and is_main() and done),
        ):
            revisit(records[i])
    bar = tqdm(
        eval_loader(dataset, num_workers, left),
        desc=text,
        unit="img",
        dynamic_ncols=True,
        disable=not (progress and is_main()),
    )
    for batch in bar:
        work(single(batch))
    barrier()
    return len(left)


def image_split(path: str | Path, class_names: Sequence[str]) -> Split:
    """A split of loose photos, one file or every image file of a folder: no masks, unknown tags.

    Raises:
        FileNotFoundError: no such file, or a folder without images.
    """
    path = Path(path).expanduser()
    files = (
        sorted(
            p
            for p in path.iterdir()
            if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and not p.name.startswith(".")
        )
        if path.is_dir()
        else [path]
    )
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} is no image, or a folder without any ({', '.join(IMAGE_SUFFIXES)})")
    stems = Counter(file.stem for file in files)
    # Two files may differ in their suffix only; then the whole file name is the name.
    records = [Record(f.stem if stems[f.stem] == 1 else f.name, f.absolute(), None, None) for f in files]
    return Split(path.stem or "photos", tuple(class_names), tuple(records))


def is_photo(infer: str) -> bool:
    """Whether an ``--infer`` argument is an image file or a folder rather than a split or a list file."""
    path = Path(infer).expanduser()
    return path.is_dir() or (path.suffix.lower() in IMAGE_SUFFIXES)


def _load_published(
    state: Mapping[str, Any], path: Path, digest: str, overrides: Sequence[str]
) -> LoadedMethod:
    """A checkpoint of the authors' programs, with the inference protocol of its published numbers."""
    try:
        published = recognise(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    data = DATA_OF_CLASSES.get(published.num_classes)
    base = load_config(data.config if data else "default.yaml")
    known = OmegaConf.merge(base, published.config, {"run_name": f"published_{published.name}"})
    assert isinstance(known, DictConfig)
    cfg = override_config(known, overrides)
    method = build_method(cfg, published.num_classes, pretrained=False)
    unmatched = published.load_into(method, state).lines()
    names = (
        data.class_names if data else ("background", *(f"class_{k}" for k in range(1, published.num_classes)))
    )
    source = f"published {published.name}"
    return LoadedMethod(method, cfg, tuple(names), path, digest, None, source, unmatched)


def _merge(a: Tensor, b: Tensor, how: Merge) -> Tensor:
    return a + b if how == "sum" else torch.maximum(a, b)


def override_config(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``key=value`` to a config that is complete already; a key it does not have is a typing error."""
    known = _dotted_keys(to_plain(cfg))
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals:
            raise ValueError(f"'{item}' is not key=value, for example data.root=/data/VOC2012")
        # Arguments of the method and of the data source are checked where they are called.
        if (
            key not in known
            and not key.startswith(("method.", "data.options."))
            and not any(k.startswith(key + ".") for k in known)
        ):
            raise KeyError(f"'{key}' is not a key of the checkpoint's config{suggest(key, known)}")
    merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(merged, DictConfig)
    return merged


def _dotted_keys(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in values.items():
        keys |= (
            _dotted_keys(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key}"}
        )
    return keys


def _load_state(method: Method, state: Mapping[str, Tensor], path: Path) -> list[str]:
    """Load weights by name and return the keys without a place; a missing or misshapen weight is an error."""
    own = method.state_dict()
    wrong = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    missing = [key for key in own if key not in state]
    if wrong or missing:
        what = (
            f"{len(wrong)} weights have another shape, first {wrong[0]}"
            if wrong
            else f"{len(missing)} weights are missing, first {missing[0]}"
        )
        raise ValueError(f"{path} does not fit its config: {what}; was a method.* key overridden?")
    method.load_state_dict(state, strict=False)
    return [f"not used: {key}" for key in state if key not in own]
