"""The only training loop: mixed precision, accumulation, logging, validation, checkpoints and exact
resume.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.optim import poly_warmup_factor, set_learning_rate
from methods.base import Losses, Method, Metrics
from utils.build import suggest
from utils.distributed import (
    all_reduce_mean,
    all_reduce_sum,
    barrier,
    is_distributed,
    is_main,
    share_buffers,
    world_size,
)
from utils.logging import LOGGER, MetricsWriter
from utils.precision import autocast
from utils.weights import load_checkpoint, save_checkpoint, unfit

WEIGHTS_ALONE = (
    "to begin with its weights alone: tools/convert_weights.py --model_path ... --out weights.safetensors, "
    "train.resume=weights.safetensors"
)
# torchrun, where it started this process. Noted once: in a pipeline it may be gone at the next training.
LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


@dataclass(frozen=True)
class TrainOptions:
    """The ``train`` section of a config, as far as the loop reads it, and the schedule of the learning
    rate.
    """

    steps: int
    accumulate: int
    precision: str
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep_every: int | None
    warmup_steps: int
    warmup_ratio: float
    power: float
    decay_steps: int | None = None  # None: all of them


class Trainer:
    """Trains a method to its last step, wherever an earlier process stopped.

    Args:
        method: the network with its losses, on its device.
        optimizer: over ``method.parameter_groups()``, each group with a ``base_lr``.
        batches: endless micro-batches of this process, from the first step on.
        header: what every checkpoint carries besides the state (config, class names).
        validate: called every ``eval_every`` steps; returns scores by name, all in percent.
        select: which of those scores picks ``best.pth``.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        batches: Callable[[int], Iterator[dict[str, Any]]],
        options: TrainOptions,
        work_dir: Path,
        device: torch.device,
        header: Mapping[str, Any],
        validate: Callable[[Method, int], dict[str, float]] | None = None,
        select: str = "seg",
    ) -> None:
        self.method, self.optimizer, self.batches, self.options = method, optimizer, batches, options
        self.work_dir, self.device, self.header = work_dir, device, header
        self.validate, self.select = validate, select
        self.step = 0  # number of finished optimiser steps
        self.scored = 0  # the last of them after which the validation was finished
        self.scores: dict[str, float] = {}  # what that validation found, percent
        self.best: float | None = None
        self.skipped = 0  # unreadable images that were replaced, over all processes
        self.window, self.metrics = _Means(device), _Means(device)
        self.untrained: set[str] = set()  # losses without a weight that were told
        self._stop_signal: int | None = None
        self._stopping = False
        self._trained: torch.nn.Module = method
        if is_distributed():
            # torch 2.15 gave the option another name.
            named = inspect.signature(DistributedDataParallel).parameters
            sync = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
            # Without device_ids, which would move to the GPU what `_to_device` left on the CPU.
            arguments: dict[str, Any] = {sync: False}
            self._trained = DistributedDataParallel(method, **arguments)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint: weights, optimiser, step, best score and random state.

        A checkpoint without optimiser (a converted one) gives its weights alone; training begins at step 0.
        """
        state = load_checkpoint(path)
        is_whole = "optimizer" in state
        if is_whole:
            self._check_data(state, path)
        weights = state["model"] if is_whole else state.get("model", state)
        own = self.method.state_dict()
        known = {key: value for key, value in own.items() if key in weights}
        if not known or (reason := unfit(own if is_whole else known, weights)):
            raise ValueError(
                f"{path} holds no weights of this {type(self.method).__name__}: "
                f"{reason if known else 'no name is the same'}; a checkpoint of a published program is "
                "converted by tools/convert_weights.py"
            )
        if not is_whole:
            found = self.method.load_state_dict(weights, strict=False)
            LOGGER.info(
                f"weights  from {path}; the optimiser starts afresh at step 0; not in the file: "
                f"{found.missing_keys or 'nothing'}; not used: {found.unexpected_keys or 'nothing'}"
            )
            return
        if other := [key for key in weights if key not in own]:
            raise ValueError(
                f"{path} is of another method: {type(self.method).__name__} has no place for {len(other)} of "
                f"its weights, first '{other[0]}'; {WEIGHTS_ALONE}"
            )
        self.method.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.skipped = state["step"], state["best"], state["skipped"]
        if state.get("select", self.select) != self.select:
            self.best = None  # it is of another score
        self.scored = state.get("scored", self.step)  # checkpoints of earlier versions do not say
        self.scores = state.get("scores", {})
        self.window.restore(state["window"])
        self.metrics.restore(state["metrics"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def _check_data(self, state: Mapping[str, Any], path: Path) -> None:
        """Classes are told apart by their number alone: others would be trained on without a word."""
        before, now = (list(header.get("class_names", ())) for header in (state, self.header))
        if before != now:
            changed = ", ".join([f"{a} -> {b}" for a, b in zip(before, now) if a != b][:5])
            if len(before) != len(now):
                changed = f"{len(before)} with background, now {len(now)}"
            raise ValueError(
                f"{path} was trained on other classes ({changed}): restore the tags or class names, or begin "
                f"a run of another name; {WEIGHTS_ALONE}"
            )
        old, new = (header.get("provenance", {}).get("data_fingerprint") for header in (state, self.header))
        if new and old != new:
            LOGGER.warning(
                f"data     other images, tags or masks than in {path} (fingerprint {old} -> {new})"
            )

    def fit(self) -> None:
        """Train from the current step to the last one."""
        options = self.options
        handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        writer = MetricsWriter(self.work_dir, self.step)
        batches = self.batches(self.step)
        started, first = time.perf_counter(), self.step
        if all_reduce_sum(torch.tensor([float(first)], device=self.device)).item() != first * world_size():
            raise ValueError(
                f"this process begins at step {first}, others do not: work_dir {self.work_dir} must be a "
                "folder that all nodes share"
            )
        bar = tqdm(
            total=options.steps,
            initial=self.step,
            disable=None if is_main() else True,
            unit="step",
            dynamic_ncols=True,
            leave=False,
        )
        try:
            if self.scored < self.step and self._is_scored():  # an earlier process died during the validation
                started += self._score(writer)
            if first >= options.steps:
                LOGGER.info(f"nothing left to train: {first} of {options.steps} steps are done")
                if not (self.work_dir / "last.pth").is_file():
                    self.save("last.pth")  # of a run that was finished in another folder
            while self.step < options.steps:
                losses, metrics = self._train_step(batches)
                self.window.add(losses)
                self.metrics.add(metrics)
                self.step += 1
                bar.update()
                if self.step % options.log_every == 0 or self.step == options.steps:
                    pace = (self.step - first) / (time.perf_counter() - started)
                    self._log(writer, self.window.collect(), self.metrics.collect(), pace)
                if self._is_scored():
                    started += self._score(writer)  # the pace counts training only
                elif self.step % options.checkpoint_every == 0 or self.step == options.steps:
                    self.save("last.pth")
                if options.keep_every and self.step % options.keep_every == 0:
                    self.save(f"step_{self.step}.pth")
                if self._stopping:
                    self._stop()
        finally:
            bar.close()
            writer.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        barrier()

    def save(self, name: str) -> None:
        """Write a checkpoint of the current step; every process calls it, the main one writes."""
        share_buffers(self.method)
        window, metrics = self.window.state(), self.metrics.state()
        if not is_main():
            return
        broken = [n for n, p in self.method.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise FloatingPointError(
                f"step {self.step}: parameter '{broken[0]}' ({len(broken)} in all) is not finite; "
                f"{name} is left as it was"
            )
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        save_checkpoint(
            self.work_dir / name,
            {
                **self.header,
                "model": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "scored": self.scored,
                # Of these weights, not of older ones.
                "scores": self.scores if self.scored == self.step else {},
                "best": self.best,
                "select": self.select,
                "skipped": self.skipped,
                "window": window,
                "metrics": metrics,
                "rng": rng,
            },
        )

    def _train_step(self, batches: Iterator[dict[str, Any]]) -> tuple[Losses, Metrics]:
        """One optimiser step over all micro-batches; returns its losses and metrics, detached and averaged
        over micro-batches.
        """
        options = self.options
        self.method.train()
        set_learning_rate(
            self.optimizer,
            poly_warmup_factor(
                self.step,
                steps=options.decay_steps or options.steps,
                warmup_steps=options.warmup_steps,
                warmup_ratio=options.warmup_ratio,
                power=options.power,
            ),
        )
        self.optimizer.zero_grad(set_to_none=True)
        sums: Losses = {}
        shown: Metrics = {}
        skipped = 0
        for index in range(options.accumulate):
            batch = _to_device(next(batches), self.device)
            skipped += int(batch.get("skipped", 0))
            is_last = index == options.accumulate - 1
            no_sync = nullcontext() if is_last or not is_distributed() else self._trained.no_sync()  # type: ignore[operator]
            with no_sync:
                with autocast(self.device, options.precision):
                    losses, metrics = self._trained(batch, self.step)
                self._check_names(losses)
                total = torch.stack(
                    [
                        self.method.loss_weight(name, self.step) * value.float()
                        for name, value in losses.items()
                    ]
                ).sum()
                (total / options.accumulate).backward()
            for means, values in ((sums, losses), (shown, metrics)):
                for name, value in values.items():
                    means[name] = means.get(name, 0) + value.detach().float() / options.accumulate
        # Three numbers travel over processes and to the CPU once a step: if a loss breaks on one process, or
        # one is asked to stop, all must stop, and at the same step.
        total = torch.stack(list(sums.values())).sum()
        stops = self._stop_signal is not None or self._is_orphan()
        told = total.new_tensor([float(stops), float(skipped)])
        total_loss, stop, replaced = all_reduce_sum(torch.cat([total[None], told])).tolist()
        self.skipped += int(replaced)
        self._stopping = stop > 0
        if not math.isfinite(total_loss):
            self._report_broken(sums)
        self.optimizer.step()
        return sums, shown

    def _check_names(self, losses: dict[str, Tensor]) -> None:
        """A weight that belongs to no loss would be a typing error that changes the result without a word, or
        ends the run hours later, where it is switched on.
        """
        whose = type(self.method).__name__
        for name, value in losses.items():
            if value.ndim:
                raise ValueError(
                    f"loss '{name}' of {whose} is a tensor of shape {tuple(value.shape)}, not a number"
                )
            if name not in self.method.loss_weights and value.requires_grad and name not in self.untrained:
                self.untrained.add(name)
                LOGGER.warning(f"note     loss {name} has no method.loss_weights.{name}: it is not trained")
        for name, weight in self.method.loss_weights.items():
            if name not in losses and any(weight.values):
                raise ValueError(
                    f"method.loss_weights.{name} belongs to no loss of {whose}{suggest(name, losses)}"
                )

    def _report_broken(self, losses: dict[str, Tensor]) -> NoReturn:
        schedules = self.method.loss_weights
        # The mean over processes: the broken value may be another's. All of them come here at the same step.
        values = all_reduce_mean(torch.stack(list(losses.values()))).tolist()
        parts = []
        for name, value in zip(losses, values, strict=True):
            text = f"{name} {value:.4g}"
            if (
                not math.isfinite(value)
                and self.step > 0
                and name in schedules
                and self.step in schedules[name].starts
            ):
                text += " (weight changed at this step)"
            parts.append(text)
        kept = self.work_dir / "last.pth"
        good = f"last good checkpoint: {kept}" if kept.is_file() else "no checkpoint was written yet"
        raise FloatingPointError(f"loss is not finite at step {self.step}: {', '.join(parts)}; {good}")

    def _log(
        self, writer: MetricsWriter, losses: dict[str, float], metrics: dict[str, float], pace: float
    ) -> None:
        # That of `optim.lr`, also where the first group learns faster: the backbone may be frozen.
        group = self.optimizer.param_groups[0]
        lr = self.optimizer.defaults["lr"] * (group["lr"] / group["base_lr"] if group["base_lr"] else 0.0)
        eta = timedelta(seconds=round((self.options.steps - self.step) / pace))
        width = len(str(self.options.steps))
        speed = f"{pace:.2f} it/s" if pace >= 1 else f"{1 / pace:.2f} s/it"
        terms = " ".join(f"{name} {value:.4f}" for name, value in {**losses, **metrics}.items())
        memory = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None
        LOGGER.info(
            f"step {self.step:>{width + 2}}/{self.options.steps}  lr {lr:.3e}  {speed}  eta {eta} | {terms}"
            + (f" | {memory:.0f} MiB" if memory else "")
            + (f" | {self.skipped} unreadable images skipped" if self.skipped else "")
        )
        writer.write(
            self.step,
            {
                "lr": lr,
                "seconds_per_step": 1 / pace,
                "loss": losses,
                "metrics": metrics,
                "skipped": self.skipped,
                **({"gpu_memory_mib": memory} if memory else {}),
            },
        )

    def _is_scored(self) -> bool:
        """Whether the current step is one that is validated after."""
        is_due = self.step % self.options.eval_every == 0 or self.step == self.options.steps
        return self.validate is not None and is_due

    def _score(self, writer: MetricsWriter) -> float:
        """Validate and save, the best score apart; returns the seconds that it took."""
        assert self.validate is not None
        started = time.perf_counter()
        self.save("last.pth")  # validation is long: nothing is lost if it is the last thing done
        self.method.eval()
        scores = self.validate(self.method, self.step)
        writer.write(self.step, {"val": scores})
        self.scored, self.scores = self.step, scores
        score = scores[self.select]
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best = score
            self.save("best.pth")
        self.save("last.pth")
        return time.perf_counter() - started

    def _request_stop(self, number: int, frame: Any) -> None:
        # A second Ctrl-C does not wait for the step. SIGTERM may come twice: from a job and its launcher.
        if self._stop_signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._stop_signal = number
        LOGGER.info("stopping after this step ...")

    def _is_orphan(self) -> bool:
        """Whether the launcher was killed, so that nobody could stop this process any more."""
        return LAUNCHER not in (None, os.getppid())

    def _stop(self) -> None:
        self.save("last.pth")
        LOGGER.info(
            f"stopped at step {self.step}; the same command goes on from {self.work_dir / 'last.pth'}"
        )
        raise SystemExit(128 + int(self._stop_signal or signal.SIGTERM))


class _Means:
    """Means of losses, or of metrics, since the last log line; summed on the device, read once per line."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def collect(self) -> dict[str, float]:
        """Means over steps and processes; starts a new window."""
        names = list(self.sums)
        if not names:
            return {}
        values = all_reduce_mean(torch.stack([self.sums[n] / self.counts[n] for n in names])).tolist()
        self.sums, self.counts = {}, {}
        return dict(zip(names, values))

    def state(self) -> dict[str, tuple[float, int]]:
        """Sum (a mean over processes) and count of each loss; every process must call it."""
        names = list(self.sums)
        if not names:
            return {}
        sums = all_reduce_mean(torch.stack([self.sums[n] for n in names])).tolist()
        return {n: (value, self.counts[n]) for n, value in zip(names, sums)}

    def restore(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Go on with the window of a checkpoint."""
        self.sums = {n: torch.tensor(value, device=self.device) for n, (value, _) in state.items()}
        self.counts = {n: count for n, (_, count) in state.items()}


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    # Seeds, indices and counts are read on the CPU: on a GPU each reading would wait for it.
    stay = {"sample_seed", "index", "skipped"}
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) and k not in stay else v
        for k, v in batch.items()
    }
