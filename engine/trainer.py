"""The only training loop: precision, accumulation, logging, validation, checkpoints and exact resume."""

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datasets.base import Batch, with_changes
from engine.checkpoint import BEST, LAST, Checkpoint, Progress, restore_state, save_state
from engine.config.schema import Train
from engine.means import Means
from engine.optim import set_learning_rate
from engine.stopping import Stopping
from methods.base import Losses, Method, Metrics
from utils.device import to_device
from utils.distributed import (
    all_reduce_mean,
    all_reduce_sum,
    barrier,
    is_distributed,
    is_main,
    share_buffers,
    world_size,
)
from utils.image import normalize
from utils.logging import LOGGER, MetricsWriter, progress_bar
from utils.precision import autocast
from utils.regions import compiled_regions

LINES = 5  # log lines that the shortest run has


class Trainer:
    """Trains a method to its last step, wherever an earlier process stopped.

    Args:
        method: the network with its losses, on its device.
        optimizer: over ``method.parameter_groups()``, each group with a ``base_lr``.
        schedule: share of the base learning rates at a step.
        batches: endless micro-batches of this process from a step on; closed at the end.
        options: the ``train`` section of a config.
        header: what every checkpoint carries besides the state (config, class names).
        validate: called every ``eval_every`` steps; returns scores by name, all in percent.
        report: called by the main process when the scores of a step are written.
        select: which of those scores picks ``best.pth``.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        batches: Callable[[int], Generator[Batch, None, None]],
        options: Train,
        work_dir: Path,
        device: torch.device,
        header: Mapping[str, Any],
        validate: Callable[[Method, int], dict[str, float]] | None = None,
        report: Callable[[MetricsWriter, int], None] | None = None,
        select: str = "seg",
    ) -> None:
        self.method, self.optimizer, self.schedule, self.batches = method, optimizer, schedule, batches
        self.options, self.work_dir, self.device, self.header = options, work_dir, device, header
        self.validate, self.report, self.progress = validate, report, Progress(select=select)
        self.losses, self.metrics = Means(device), Means(device)  # since the last log line
        self.stopping = Stopping()
        self.ema = None
        if options.ema is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(method, decay=options.ema, exclude_buffers=True)
        self._named: set[str] = set()  # losses without a weight that the log named
        self._trained: torch.nn.Module = method
        if is_distributed():
            # Without device_ids, which would move to the GPU what `batch_to_device` left on the CPU.
            self._trained = DistributedDataParallel(method)
            # `save` shares the buffers. As an argument it has other names in other versions of torch.
            self._trained.broadcast_buffers = False  # type: ignore[assignment]

    @property
    def average(self) -> Method | None:
        """The moving average of the method, where there is one."""
        return self.ema.module if self.ema else None  # type: ignore[return-value]

    @property
    def step(self) -> int:
        """Number of finished optimiser steps."""
        return self.progress.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights, optimiser, step, best score and random state."""
        about = self.header, self.device, self.progress.select, self.average
        self.progress = restore_state(checkpoint, self.method, self.optimizer, *about)
        self.losses.restore(self.progress.losses)
        self.metrics.restore(self.progress.metrics)

    def fit(self) -> None:
        """Train from the current step to the last one.

        Raises:
            SystemExit: after a stop signal, when the step is done and saved.
            FloatingPointError: a loss is not finite; names it and the step.
        """
        options, first, seconds = self.options, self.step, 0.0
        compiled = compiled_regions(self.method, self.device) if self._compiles() else nullcontext()
        self._check_same_start()
        log_every = options.log_every or max(min(200, options.steps // LINES), 1)
        look = {"unit": "step", "leave": False, "disable": not is_main()}
        with (
            self.stopping,
            compiled,
            closing(MetricsWriter(self.work_dir, first)) as writer,
            closing(self.batches(first)) as batches,
            progress_bar(total=options.steps, initial=first, desc="train", **look) as bar,
        ):
            if self.progress.scored < first and self._is_scored():  # a process died during the validation
                self._score(writer)
            if first >= options.steps:
                LOGGER.info(f"nothing left to train: {first} of {options.steps} steps are done")
                if not (self.work_dir / LAST).is_file():
                    self.save(LAST)  # of a run that was finished in another folder
            while self.step < options.steps:
                started = time.perf_counter()
                stop = self._train_step(batches)
                seconds += time.perf_counter() - started
                bar.update()
                if self.step % log_every == 0 or self.step == options.steps:
                    self._log((self.step - first) / seconds, writer)
                elif self.step == first + 1:  # nobody should wait long for a sign of life
                    self._log(1 / seconds)
                if self._is_scored() and not stop:
                    self._score(writer)
                elif stop or self.step % options.checkpoint_every == 0 or self.step == options.steps:
                    self.save(LAST)
                if options.keep_every and self.step % options.keep_every == 0:
                    self.save(f"step_{self.step}.pth")
                if stop:
                    LOGGER.info(
                        f"stopped at step {self.step}; the same command continues from {self.work_dir / LAST}"
                    )
                    raise SystemExit(self.stopping.exit_code)
        barrier()

    def _compiles(self) -> bool:
        return self.options.compile == "regions"

    def save(self, name: str) -> None:
        """Write a checkpoint of the current step; every process calls it, the main one writes."""
        share_buffers(self.method)
        self.progress.losses, self.progress.metrics = self.losses.state(), self.metrics.state()
        if is_main():
            about = self.progress, self.header, self.device, self.average
            save_state(self.work_dir / name, self.method, self.optimizer, *about)

    def _train_step(self, batches: Generator[Batch, None, None]) -> bool:
        """One optimiser step over all micro-batches; returns whether a process was asked to stop."""
        parts, step = self.options.accumulate, self.step
        self.method.train()
        set_learning_rate(self.optimizer, self.schedule(step))
        self.optimizer.zero_grad(set_to_none=True)
        sums: Losses = {}
        shown: Metrics = {}
        for part in range(parts):
            batch = batch_to_device(next(batches), self.device)
            synced = part == parts - 1 or not is_distributed()
            with nullcontext() if synced else self._trained.no_sync():  # type: ignore[operator]
                with autocast(self.device, self.options.precision):
                    losses, metrics = self._trained(batch, step)
                self._check_losses(losses)
                weight = self.method.loss_weight
                weighted = [weight(name, step) * loss.float() for name, loss in losses.items()]
                (torch.stack(weighted).sum() / parts).backward()
            for means, values in ((sums, losses), (shown, metrics)):
                for name, value in values.items():
                    means[name] = means.get(name, 0) + value.detach().float() / parts
        # Two numbers travel over processes and to the CPU once a step: if a loss breaks on one process, or
        # one is asked to stop, all must stop, and at the same step.
        total = torch.stack(list(sums.values())).sum()
        requested = to_device(torch.tensor([float(self.stopping.requested)]), self.device)
        total_loss, stop = all_reduce_sum(torch.cat([total[None], requested])).tolist()
        if not math.isfinite(total_loss):
            self._report_broken(sums)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.method)
        self.losses.add(sums)
        self.metrics.add(shown)
        self.progress.step += 1
        self.progress.scores = {}  # they are of older weights
        return stop > 0

    def _check_same_start(self) -> None:
        first = self.step
        total = all_reduce_sum(torch.tensor([float(first)], device=self.device)).item()
        if total != first * world_size():
            raise ValueError(f"processes start at other steps than {first}: is {self.work_dir} shared?")

    def _check_losses(self, losses: Losses) -> None:
        """A weight that belongs to no loss would be a typing error that changes the result without a word."""
        for name, loss in losses.items():
            if name not in self.method.loss_weights and loss.requires_grad and name not in self._named:
                self._named.add(name)
                LOGGER.warning(f"note     loss {name} has no method.loss_weights.{name}: it is not trained")
        for name in self.method.loss_weights:
            self.method.check_loss_weight(name, losses)

    def _report_broken(self, losses: Losses) -> NoReturn:
        # The mean over processes: the broken value may be another's. All of them come here at the same step.
        values = all_reduce_mean(torch.stack(list(losses.values()))).tolist()
        parts = []
        for name, value in zip(losses, values, strict=True):
            schedule = self.method.loss_weights.get(name)
            changed = schedule is not None and 0 < self.step in schedule.starts
            note = " (weight changed at this step)" if changed and not math.isfinite(value) else ""
            parts.append(f"{name} {value:.4g}{note}")
        kept = self.work_dir / LAST
        good = f"last good checkpoint: {kept}" if kept.is_file() else "no checkpoint was written yet"
        raise FloatingPointError(f"loss is not finite at step {self.step}: {', '.join(parts)}; {good}")

    def _log(self, pace: float, writer: MetricsWriter | None = None) -> None:
        """One line for people; with a writer one record too, which starts a new window."""
        steps, losses, metrics = self.options.steps, self.losses.means(), self.metrics.means()
        # That of `optim.lr`, also where the first group learns faster: the backbone may be frozen.
        group = self.optimizer.param_groups[0]
        lr = self.optimizer.defaults["lr"] * (group["lr"] / group["base_lr"] if group["base_lr"] else 0.0)
        trained = {name: v for name, v in losses.items() if self.method.loss_weight(name, self.step - 1)}
        idle = {name: v for name, v in losses.items() if name not in trained}
        memory = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None
        parts = [
            f"step {self.step:>{len(str(steps)) + 2}}/{steps}  lr {lr:.3e}  "
            + (f"{pace:.2f} it/s" if pace >= 1 else f"{1 / pace:.2f} s/it")
            + f"  eta {timedelta(seconds=round((steps - self.step) / pace))}",
            _terms(trained),
            f"weight 0: {_terms(idle)}" if idle else "",
            _terms(metrics),
            f"{memory:.0f} MiB" if memory else "",
        ]
        LOGGER.info(" | ".join(part for part in parts if part))
        if writer is None:
            return
        self.losses.clear()
        self.metrics.clear()
        record = {"lr": lr, "seconds_per_step": 1 / pace, "loss": losses, "metrics": metrics}
        record |= {"gpu_memory_mib": memory} if memory else {}
        writer.write(self.step, record)

    def _is_scored(self) -> bool:
        """Whether the current step is one that is validated after."""
        is_due = self.step % self.options.eval_every == 0 or self.step == self.options.steps
        return self.validate is not None and is_due

    def _score(self, writer: MetricsWriter) -> None:
        """Validate and save, the best score apart."""
        assert self.validate is not None
        progress = self.progress
        self.save(LAST)  # validation is long: nothing is lost if it is the last thing done
        self.method.eval()
        # Photos have many sizes, and each would be compiled.
        eager = torch.compiler.set_stance("force_eager") if self._compiles() else nullcontext()
        with self.stopping.at_once(), eager:
            scores = self.validate(self.average or self.method, self.step)
        writer.write(self.step, {"val": scores})
        if self.report is not None and is_main():
            self.report(writer, self.step)
        progress.scored, progress.scores = self.step, scores
        score = scores[progress.select]
        if math.isfinite(score) and (progress.best is None or score > progress.best):
            progress.best = score
            self.save(BEST)
        self.save(LAST)


def _terms(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in values.items())


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device, as far as it is computed with; pictures, which come as bytes, are normalised."""
    # These are read on the CPU: on a GPU each reading would wait for it.
    stay = {"sample_seed", "index", "most_classes", "changes"}
    moved = {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) and k not in stay else v
        for k, v in batch.items()
    }
    batch = with_changes(moved)
    pictures = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dtype == torch.uint8}
    return batch | {k: normalize(v) for k, v in pictures.items() if v.dim() == 4}
