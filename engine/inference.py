"""Inference over a data set: load a checkpoint, list photos, visit every image once."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import datasets.coco
import datasets.voc
from datasets.base import Record, Split, WeakSegDataset
from datasets.custom import find_images
from datasets.lists import real_classes
from datasets.loader import eval_loader
from datasets.pictures import is_picture
from engine.config.load import load_config, override_config, to_plain
from engine.data import load_split
from engine.method import build_method
from methods.base import Method
from methods.published import recognise
from models.refiners.dense_crf import PRESETS
from utils.cli import message_of
from utils.distributed import barrier, is_main, shard
from utils.image import AS_TYPED, Reading, UnreadableImageError
from utils.logging import progress_bar
from utils.mappings import merge
from utils.weights import FORMAT, file_digest, load_checkpoint, unfit

# Config and class names of what a published checkpoint was trained on, by its number of classes.
DATA_OF_CLASSES: dict[int, tuple[str, Sequence[str]]] = {
    21: ("datasets/voc.yaml", datasets.voc.CLASS_NAMES),
    81: ("datasets/coco.yaml", datasets.coco.CLASS_NAMES),
}


@dataclass
class LoadedMethod:
    """A method with trained weights, in eval mode, and what is known about it."""

    method: Method
    cfg: DictConfig  # of the checkpoint, with overrides; made up for a published one
    class_names: tuple[str, ...]  # background first
    path: Path
    sha256: str
    step: int | None
    source: str = "tag2mask"  # or the name of the published program
    unmatched: list[str] = field(default_factory=list)  # keys of the file without a place, and missing ones

    def describe(self) -> str:
        """Lines that say what was loaded, every unmatched key among them."""
        step = "" if self.step is None else f", step {self.step}"
        lines = [
            f"model    {self.path} ({self.source}{step}, {len(real_classes(self.class_names))} classes, "
            f"{self.cfg.method.target})"
        ]
        if self.source != "tag2mask" or self.unmatched:
            lines.append(f"         unmatched keys: {len(self.unmatched)}")
        lines += [f"         {key}" for key in self.unmatched]
        return "\n".join(
            [*lines, *([] if self.decoder_is_trained else ["         its decoder is untrained"])]
        )

    @property
    def decoder_is_trained(self) -> bool:
        """False while the loss of the decoder has never had weight; of converted weights nobody knows."""
        name, weights = self.method.decoder_loss, self.method.loss_weights
        if name is None or not self.step:
            return True
        schedule = weights.get(name)
        steps = zip(schedule.starts, schedule.values) if schedule else ()
        return any(weight and start < self.step for start, weight in steps)

    def provenance(self) -> dict[str, Any]:
        """What identifies the weights, for a score record."""
        known: dict[str, Any] = {"checkpoint": str(self.path), "checkpoint_sha256": self.sha256}
        known |= {"step": self.step, "source": self.source}
        # Of a published checkpoint nobody knows the seed, and the config is ours.
        return known if self.source == "tag2mask" else {**known, "seed": None, "run_name": None}


def load_method(path: str | Path, device: torch.device | str, overrides: Sequence[str] = ()) -> LoadedMethod:
    """Build the method of a checkpoint, without pretrained weights, and load it.

    Checkpoints of the authors' programs (``methods/published``) are recognised by their key names.

    Args:
        path: our checkpoint, or a published one (``module.`` prefix or not); or the config of a method that
            nothing trains, such as CLIP-ES.
        overrides: ``key=value`` changes of the checkpoint's config, for example ``data.root=/data/VOC2012``.

    Raises:
        ValueError: the file is damaged, is of no known program, or does not fit its config.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return _untrained(path, device, overrides)
    state = load_checkpoint(path)
    digest = file_digest(path)
    if state.get("format") == FORMAT:
        cfg = override_config(OmegaConf.create(state["config"]), overrides)
        method = build_method(cfg, len(state["class_names"]), pretrained=False)
        unmatched = _load_state(method, state["model"], path)
        names, step = tuple(state["class_names"]), state.get("step")
        loaded = LoadedMethod(method, cfg, names, path, digest, step, unmatched=unmatched)
    else:
        loaded = _load_published(state, path, digest, overrides)
    loaded.method.to(device).eval().requires_grad_(False)
    return loaded


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
    """Call ``work(sample)`` for every image of this process's share; returns their number, when all are done.

    Args:
        finished: True for records whose result is there already; their image is not even read.
        revisit: called for those instead, for example to count them in a score.

    Raises:
        UnreadableImageError: at the end, for the images that could not be read.
    """
    share, records, hidden = list(shard(len(dataset))), dataset.split.records, not (progress and is_main())
    # Asked before work starts: a result that appears meanwhile was made by this run.
    done = [i for i in share if finished is not None and finished(records[i])]
    left = sorted(set(share) - set(done))
    if revisit is not None:
        before = f"{text} (finished before)"
        for i in progress_bar(done, desc=before, unit="img", leave=False, disable=hidden or not done):
            revisit(records[i])
    images = iter(eval_loader(dataset, num_workers, left))
    unreadable: list[str] = []
    with progress_bar(total=len(left), desc=text, unit="img", disable=hidden) as bar:
        for _ in left:
            try:
                sample = next(images)
            except UnreadableImageError as error:
                unreadable.append(message_of(error))
            else:
                work(sample)
            bar.update()
    barrier()  # the other processes finish theirs too
    if unreadable:
        shown = "; ".join(unreadable[:3]) + ("; ..." if len(unreadable) > 3 else "")
        raise UnreadableImageError(
            f"{len(unreadable)} of {len(dataset)} images: {shown}. The others are done; mend these and "
            "run the same command again"
        )
    return len(left)


def image_split(path: str | Path, class_names: Sequence[str], reading: Reading = AS_TYPED) -> Split:
    """A split of loose photos, one file or all in a folder (`find_images`): no masks, unknown tags.

    Raises:
        FileNotFoundError: no such file, or a folder without images.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no photo {path}")
    files = find_images(path, subfolders=False) if path.is_dir() else {path.stem: path}
    records = (Record(name, file.absolute(), None, None, reading) for name, file in files.items())
    return Split(path.stem or "photos", tuple(class_names), tuple(records))


def is_photo(infer: str) -> bool:
    """Whether an ``--infer`` argument is an image file or a folder rather than a split or a list file."""
    path = Path(infer).expanduser()
    return path.is_dir() or is_picture(path)


def _untrained(path: Path, device: torch.device | str, overrides: Sequence[str]) -> LoadedMethod:
    """The method of a config with its pretrained weights."""
    cfg = load_config(path, overrides)
    names = load_split(cfg.data, cfg.data.train_set).class_names
    method = build_method(cfg, len(names)).to(device).eval().requires_grad_(False)
    section = json.dumps(to_plain(cfg.method), sort_keys=True)
    digest = hashlib.sha256(section.encode()).hexdigest()
    return LoadedMethod(method, cfg, names, path, digest, None)


def _load_published(
    state: Mapping[str, Any], path: Path, digest: str, overrides: Sequence[str]
) -> LoadedMethod:
    """A checkpoint of the authors' programs, with the inference protocol of its published numbers."""
    try:
        published = recognise(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config, names = DATA_OF_CLASSES.get(published.num_classes, (None, ()))
    base = to_plain(load_config(config)) if config else {}
    known = merge(base, published.config, {"run_name": f"published_{published.name}"})
    cfg = override_config(OmegaConf.create(known), overrides)
    method = build_method(cfg, published.num_classes, pretrained=False)
    unmatched = published.load_into(method, state).lines()
    if published.name in PRESETS:  # SeCo's checkpoints run in the network that it shares with ToCo
        method.crf_preset = published.name
    names = names or ("background", *(f"class_{k}" for k in range(1, published.num_classes)))
    source = f"published {published.name}"
    return LoadedMethod(method, cfg, tuple(names), path, digest, None, source, unmatched)


def _load_state(method: Method, state: Mapping[str, Tensor], path: Path) -> list[str]:
    """Load weights by name and return the keys without a place; a missing or misshapen weight is an error."""
    own = method.state_dict()
    needed = {key: value for key, value in own.items() if not key.startswith(method.training_only)}
    if reason := unfit(needed, state):
        raise ValueError(f"{path} does not fit its config: {reason}; was a method.* key overridden?")
    method.load_state_dict(state, strict=False)
    return [f"not used: {key}" for key in state if key not in own]
