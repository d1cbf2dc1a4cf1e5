"""Train one method on one data set: ``run(cfg)`` builds everything from the config and fits it."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from datasets.agreement import class_counts, compare_masks_with_tags, tag_warnings
from datasets.base import Batch, Split, WeakSegDataset
from datasets.context_decoupling import ContextDecoupledDataset, ObjectBank, Paste
from datasets.loader import StepSampler, train_batches
from engine.checkpoint import BEST, LAST, Checkpoint, find_start, foreign_start, run_folder
from engine.checks import check_training, unreached
from engine.config.load import project_path, to_plain
from engine.data import load_split
from engine.details import tag_pairs
from engine.method import build_method
from engine.optim import build_optimizer, decayed_by_layer, poly_warmup_factor
from engine.report import REPORT, refresh, write_report
from engine.runs import INFO
from engine.scores.records import provenance, write_scores
from engine.seen import EACH, record_examples, record_seen, spread
from engine.trainer import Trainer
from engine.validation import protocols, validate
from methods.base import Method, Predicts
from models.backbones import layer_scales, whole_crop
from utils.build import suggest
from utils.distributed import init_process_group, is_main, rank, world_size
from utils.files import alone_in, write_json
from utils.logging import LOGGER, setup_logging, warn_once
from utils.seed import seed_everything, seed_process


def run(cfg: DictConfig) -> Path:
    """Train by a config and return the run folder, which holds ``last.pth``, ``best.pth`` and the records."""
    device = init_process_group(cfg.device)
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    train_split = load_split(cfg.data, cfg.data.train_set)
    val_split = load_split(cfg.data, cfg.data.val_set) if cfg.data.val_set else None
    check_training(cfg, train_split.num_classes)
    seed_everything(cfg.seed, cfg.train.deterministic)
    work_dir = run_folder(cfg)
    with alone_in(work_dir), _mirror(cfg, work_dir):
        _train(cfg, train_split, val_split, device, work_dir, find_start(cfg, work_dir))
    return work_dir


def _mirror(cfg: DictConfig, work_dir: Path) -> AbstractContextManager[Any]:
    """A run of Weights & Biases that repeats what TensorBoard gets, if ``train.wandb`` names a project."""
    if cfg.train.wandb is None or not is_main():
        return nullcontext()
    import wandb

    return wandb.init(
        project=cfg.train.wandb, name=cfg.run_name, dir=work_dir, config=to_plain(cfg), sync_tensorboard=True
    )


def _train(
    cfg: DictConfig,
    train_split: Split,
    val_split: Split | None,
    device: torch.device,
    work_dir: Path,
    start: Checkpoint | None,
) -> None:
    setup_logging(work_dir)
    if is_main():
        OmegaConf.save(cfg, work_dir / "config.yaml")
    method = build_method(cfg, train_split.num_classes, pretrained=start is None).to(device)
    if not isinstance(method, Predicts):  # networks that only serve a later stage of a pipeline
        val_split = None
    source = provenance(cfg, train_split) if is_main() else {}
    if is_main():
        about = {"class_names": train_split.class_names, "pairs": tag_pairs(train_split)}
        write_json(work_dir / INFO, {**source, **about})
    foreign, optim = foreign_start(cfg), to_plain(cfg.optim)
    course = {key: optim.pop(key) for key in ("warmup_steps", "warmup_ratio", "power")}
    decay_steps = optim.pop("decay_steps") or cfg.train.steps
    groups, layer_decay = method.parameter_groups(), optim.pop("layer_decay")
    if layer_decay != 1:
        groups = decayed_by_layer(groups, layer_scales(method.get_submodule("backbone"), layer_decay))
    trainer = Trainer(
        method,
        build_optimizer(groups, **optim),
        partial(poly_warmup_factor, steps=decay_steps, **course),
        _batches(cfg, _training_set(cfg, train_split, method), device),
        cfg.train,
        work_dir,
        device,
        header={
            "config": to_plain(cfg),
            "class_names": list(train_split.class_names),
            "provenance": source,
            "resumed_from": str(foreign) if foreign else None,
        },
        validate=_validation(cfg, method, val_split, device, work_dir) if val_split else None,
        report=partial(refresh, work_dir),
        select=cfg.eval.select,
    )
    if start is not None:
        trainer.restore(start)
    seed_process(cfg.seed, trainer.step, rank())
    _log_start(cfg, method, train_split, val_split, device, work_dir)
    if start is not None:
        LOGGER.info(f"resume   {start.path} at step {trainer.step}")
    trainer.fit()
    if is_main() and not val_split:
        if isinstance(method, Predicts):
            seen_by, dataset = (trainer.average or method).eval(), WeakSegDataset(train_split)
            drawn = {"size": cfg.eval.size, "device": device, "precision": cfg.train.precision}
            indices = sorted(spread(len(dataset), EACH))
            record_examples(work_dir, seen_by, dataset, indices, step=trainer.step, **drawn)
        write_report([work_dir], work_dir / REPORT)
    best = trainer.progress.best
    found = "" if best is None else f", best {cfg.eval.select} {best:.2f} in {BEST}"
    LOGGER.info(f"done: {work_dir / LAST}{found}")


def _training_set(cfg: DictConfig, split: Split, method: Method) -> WeakSegDataset | ContextDecoupledDataset:
    """Images with the method's transform and, where the config says so, labels and pasted objects."""
    data = cfg.data
    dataset = WeakSegDataset(
        split,
        transform=method.train_transform(
            whole_crop(method, data.crop_size, "data.crop_size"), tuple(data.scale_range)
        ),
        label_dir=project_path(data.label_dir) if data.label_dir else None,
        with_mask=data.learn_from == "masks",
        mask_key="pseudo_label",
    )
    options = dict(data.context_decoupling)
    folder = options.pop("bank")
    if not folder:
        return dataset
    bank = ObjectBank(project_path(folder), split.class_names)
    LOGGER.info(f"objects  {len(bank)} of {len(bank.names)} classes to paste, from {bank.folder}")
    return ContextDecoupledDataset(dataset, bank, Paste(**options))


def _batches(
    cfg: DictConfig, dataset: WeakSegDataset | ContextDecoupledDataset, device: torch.device
) -> Callable[[int], Generator[Batch, None, None]]:
    batch_size = cfg.train.batch_size // (2 if isinstance(dataset, ContextDecoupledDataset) else 1)

    def from_step(step: int) -> Generator[Batch, None, None]:
        sampler = StepSampler(
            len(dataset), batch_size, cfg.seed, start_step=step, accumulate=cfg.train.accumulate
        )
        return train_batches(dataset, sampler, cfg.data.num_workers, on_gpu=device.type == "cuda")

    return from_step


def _validation(
    cfg: DictConfig, method: Method, split: Split, device: torch.device, work_dir: Path
) -> Callable[[Method, int], dict[str, float]]:
    """Scores of the split; what would end the first validation, or make it worthless, is an error now."""
    dataset = WeakSegDataset(split, with_mask=True)
    compare_masks_with_tags(split)
    run = partial(
        validate, size=cfg.eval.size, device=device, scores=cfg.eval.scores, precision=cfg.train.precision
    )
    tagged = next((record for record in split.records if record.tags is not None), split.records[0])
    one_image = WeakSegDataset(replace(split, records=(tagged,)), with_mask=True)
    known = run(method, one_image, progress=False).percent()
    if cfg.eval.select not in known:
        raise ValueError(
            f"eval.select={cfg.eval.select} is not a score of this method{suggest(cfg.eval.select, known)}"
        )
    source = provenance(cfg, split)

    def score(method: Method, step: int) -> dict[str, float]:
        result = run(method, dataset, num_workers=cfg.data.num_workers)
        percent, outputs = result.percent(), result.results.get("miou", {})
        means = "  ".join(f"{output} {percent[output]:.2f}" for output in outputs)
        others = "".join(f"; {name} {share:.1f} %" for name, share in percent.items() if name not in outputs)
        settings = {"size": cfg.eval.size, "background_threshold": method.background_threshold}
        settings |= {"cam_scales": list(method.cam_scales), "precision": cfg.train.precision}
        made_by = {**source, "checkpoint": str(work_dir), "step": step}
        if is_main():
            records = result.records(protocols(method, split.name), settings, made_by)
            write_scores(work_dir, records)
            drawn = {"size": cfg.eval.size, "device": device, "precision": cfg.train.precision}
            record_seen(work_dir, result, method, dataset, step=step, **drawn)
        LOGGER.info(
            f"val    {step}  {means}  (mIoU %, {int(result.images)} images of {split.name}; "
            f"{cfg.eval.size} px squares, seg single scale, CAM background threshold "
            f"{method.background_threshold}{others})\n{result.tables(shares=True)}"
        )
        return percent

    return score


def _log_start(
    cfg: DictConfig,
    method: Method,
    train_split: Split,
    val_split: Split | None,
    device: torch.device,
    work_dir: Path,
) -> None:
    """The first lines of the log; classes and counts show a tag file that was read wrongly."""
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"cpu ({torch.get_num_threads()} threads)"
    processes, parts = world_size(), cfg.train.accumulate
    counts = class_counts(train_split)
    classes = list(counts)
    rarest = sorted(counts, key=lambda name: counts[name])[:8]
    LOGGER.info(f"run      {work_dir}")
    LOGGER.info(f"method   {cfg.method.target}   seed {cfg.seed}   torch {torch.__version__}")
    if isinstance(backbone := to_plain(cfg.method).get("backbone"), dict):
        weights = backbone.get("pretrained") or "drawn, not pretrained"
        LOGGER.info(f"backbone {backbone.get('name')}   weights {weights}")
    LOGGER.info(
        f"data     {cfg.data.name}: {len(train_split)} training images ({cfg.data.train_set}), "
        f"{len(classes)} classes ({', '.join(classes[:6])}{', ...' if classes[6:] else ''})"
        + (f", {len(val_split)} to score ({cfg.data.val_set})" if val_split else "")
    )
    fewest = ", ".join(f"{name} {counts[name]}" for name in rarest)
    LOGGER.info(f"         rarest: {fewest} images")
    for warning in tag_warnings(train_split):
        warn_once(warning)
    LOGGER.info(
        f"batch    {cfg.train.batch_size} = {processes} processes x {parts} micro-batches x "
        f"{cfg.train.batch_size // (processes * parts)} images on {where}"
    )
    if late := unreached(method, cfg.train.steps, cfg.optim.warmup_steps):
        LOGGER.info(f"note     train.steps={cfg.train.steps} ends before {late}")
