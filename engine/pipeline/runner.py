"""Run the stages of a multi-stage method in order; what is finished and unchanged is not done again.

A stage is a module with ``Options`` and ``run(options)``, which writes to ``<work_dir>/<name>``
(docs/pipelines.md).
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf

from engine.config.load import load_config, project_path
from engine.pipeline import stamp
from engine.pipeline.pictures import draw_stage
from engine.pipeline.plan import Plan, make_plans
from engine.report import REPORT, write_report
from engine.scores.records import read_scores
from engine.scores.tables import text_table
from engine.seen import SEEN
from utils.distributed import all_reduce_sum, barrier, init_process_group, is_main
from utils.files import alone_in, write_atomic
from utils.logging import LOGGER, setup_logging


def run(config: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run what is not finished of a pipeline, a config with ``stages``; returns its folder.

    Raises:
        KeyError, ValueError: as `make_plans`, before the first stage runs.
    """
    cfg = load_config(config, overrides)
    device = init_process_group(cfg.device)
    plans = make_plans(config, overrides)
    work_dir = project_path(cfg.work_dir)
    setup_logging(work_dir)
    with alone_in(work_dir):
        if is_main():
            OmegaConf.save(cfg, work_dir / "pipeline.yaml")
        LOGGER.info(f"pipeline {work_dir}: {', '.join(plan.name for plan in plans)}")
        rows: list[list[str]] = []
        for number, plan in enumerate(plans, start=1):
            title = f"stage {number}/{len(plans)} {plan.name} ({plan.module})"
            is_finished = is_main() and stamp.prepare(plan.folder, _settings(plan, work_dir), title)
            # What the main process says.
            is_finished = bool(all_reduce_sum(torch.tensor(float(is_finished), device=device)))
            if not is_finished:
                started = time.monotonic()
                _run_stage(plan, title)
                setup_logging(work_dir)  # a training logs to its own folder
                if is_main():
                    # The images that it worked on, or else those of the first training.
                    if images := next((p.images for p in (plan, *plans[:number]) if p.images), None):
                        draw_stage(plan.folder, images, device)
                        drawn = [p.folder for p in plans[:number] if (p.folder / SEEN).is_dir()]
                        write_report(drawn, work_dir / REPORT, work_dir.name)
                    stamp.finish(plan.folder)
                    LOGGER.info(f"{title}: done in {(time.monotonic() - started) / 60:.1f} minutes")
            while not stamp.run_of(plan.folder):  # however long: a barrier would give up after minutes
                time.sleep(0.2)
            barrier()
            rows += _score_rows(plan, "unchanged" if is_finished else "done")
        table = text_table(["Stage", "state", "protocol", "mIoU %"], rows)
        if is_main():
            write_atomic(work_dir / "table.txt", (table + "\n").encode())
        LOGGER.info(f"\n{table}\n\nreport of every stage: {work_dir / REPORT}")
    return work_dir


def _settings(plan: Plan, work_dir: Path) -> dict[str, str]:
    """What decides the output of a stage: its settings, and what its inputs hold, wherever they are."""
    held = {}
    for key, path in plan.inputs.items():
        if path.is_relative_to(work_dir):  # what an earlier stage made
            name = path.relative_to(work_dir)
            held[key] = f"{name} of run {stamp.run_of(work_dir / name.parts[0])}"
        else:
            held[key] = stamp.content(path)
    return plan.settings | held


def _run_stage(plan: Plan, title: str) -> None:
    if plan.checkpoint is not None and plan.checkpoint.is_file():
        # With auto it would compare the paths of its config, which differ in a run folder that was moved.
        plan.options.train.resume = str(plan.checkpoint)
    try:
        if plan.shares_work or is_main():
            plan.run(plan.options)
    except KeyboardInterrupt:
        if plan.checkpoint is None:  # a training says so itself
            LOGGER.info(f"{title}: stopped; the same command continues it")
        raise


def _score_rows(plan: Plan, state: str) -> list[list[str]]:
    """A line for the last score of each protocol in a stage's folder."""
    latest = {record["protocol"]: record["score"].get("miou") for record in read_scores(plan.folder)}
    scores = [[protocol, "-" if miou is None else f"{100 * miou:.2f}"] for protocol, miou in latest.items()]
    return [[plan.name, state, *score] for score in scores or [["-", "-"]]]
