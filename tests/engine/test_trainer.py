"""One loop for all methods: exact resume, clear failures, weights applied by the engine."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from engine.checkpoint import Checkpoint, last_good
from engine.config.schema import Train
from engine.optim import build_optimizer, poly_warmup_factor
from engine.trainer import Trainer
from methods.base import Method
from utils.seed import sample_generator, sample_seed
from utils.weights import load_checkpoint

OPTIONS = Train(steps=8, precision="fp32", eval_every=100, checkpoint_every=3)


class Toy(Method):
    """Linear regression with a random draw per sample, so that a resume that loses its place shows."""

    def __init__(self, **options):
        super().__init__(num_classes=2, **{"loss_weights": {"fit": 1.0}, **options})
        self.linear = nn.Linear(3, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch, step):
        self.seen += 1
        noise = torch.stack(
            [torch.rand(1, generator=sample_generator(int(s), "noise")) for s in batch["sample_seed"]]
        )
        error = self.linear(batch["image"]) + noise - 1
        losses = {"fit": error.square().mean()}
        if "late" in self.loss_weights:
            losses["late"] = error.abs().mean() * batch.get("scale", 1.0)
        return losses, {"level": error.detach().mean(), "broken": error.detach().mean() * math.nan}


def batches(start, broken_at=None):
    for step in range(start, 10**6):
        image = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        scale = torch.tensor(float("nan") if step == broken_at else 1.0)
        yield {"image": image, "sample_seed": torch.full((4,), sample_seed(0, 0, step)), "scale": scale}


def interrupted(start, at, by):
    """Batches of which the one of step ``at`` calls ``by`` first."""
    for step, batch in enumerate(batches(start), start):
        if step == at:
            by()
        yield batch


def trainer(work_dir, source=batches, validate=None, options=OPTIONS, header=None, **method_options):
    torch.manual_seed(0)
    method = Toy(**method_options)
    work_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(
        method,
        build_optimizer(method.parameter_groups(), lr=0.05, weight_decay=0.01),
        partial(poly_warmup_factor, steps=8, warmup_steps=2, warmup_ratio=1e-6, power=0.9),
        source,
        options,
        work_dir,
        torch.device("cpu"),
        {"config": {}} if header is None else header,
        validate,
    )


def resume(folder, **options):
    run = trainer(folder, **options)
    run.restore(last_good(folder))
    return run


def records(folder):
    """Without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


def assert_same(folder, whole):
    (_, state), (_, expected) = last_good(folder), last_good(whole)
    torch.testing.assert_close(state["model"], expected["model"], rtol=0, atol=0)
    torch.testing.assert_close(state["optimizer"]["state"], expected["optimizer"]["state"], rtol=0, atol=0)
    assert records(folder) == records(whole)


@pytest.fixture
def whole(tmp_path):
    """Folder of a run that nothing interrupted."""
    trainer(tmp_path / "whole").fit()
    return tmp_path / "whole"


def killed():
    raise InterruptedError


@pytest.mark.parametrize(("at", "step"), [(4, 3), (7, 6)])
def test_steps_and_a_resume_equal_an_uninterrupted_run(tmp_path, whole, at, step):
    """Checkpoints between two log lines too; the record holds no step twice."""
    with pytest.raises(InterruptedError):
        trainer(tmp_path / "parts", partial(interrupted, at=at, by=killed)).fit()
    run = resume(tmp_path / "parts")
    assert run.step == step
    run.fit()
    assert [line["step"] for line in records(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert_same(tmp_path / "parts", whole)


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "gone"])
def test_damaged_checkpoint_costs_the_steps_after_the_one_before(tmp_path, whole, damage):
    folder = tmp_path / "parts"
    with pytest.raises(InterruptedError):
        trainer(folder, partial(interrupted, at=7, by=killed)).fit()
    last = folder / "last.pth"
    content = bytearray(last.read_bytes())
    if damage == "flipped":
        weights = load_checkpoint(last)["model"]["linear.weight"].numpy().tobytes()
        content[content.index(weights)] ^= 1
    last.write_bytes(content[: {"empty": 0, "torn": len(content) // 2}.get(damage)])
    if damage == "gone":  # killed between two renames
        last.unlink()
    run = resume(folder)
    assert run.step == 3
    run.fit()
    assert_same(folder, whole)


def test_no_good_checkpoint_is_an_error(tmp_path):
    assert last_good(tmp_path) is None
    for name in ("last.pth", "previous.pth"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="resume=never"):
        last_good(tmp_path)


def test_loss_that_is_not_finite_names_itself_and_leaves_the_last_checkpoint(tmp_path):
    weights = {"fit": 1.0, "late": [[0, 0.0], [5, 1.0]]}
    run = trainer(tmp_path, partial(batches, broken_at=5), loss_weights=weights)
    with pytest.raises(FloatingPointError, match=r"step 5: fit [\d.]+, late nan \(weight changed"):
        run.fit()
    assert load_checkpoint(tmp_path / "last.pth")["step"] == 3


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = trainer(tmp_path)
    run.save("last.pth")
    with torch.no_grad():
        run.method.linear.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="linear.weight"):
        run.save("last.pth")
    assert load_checkpoint(tmp_path / "last.pth")["model"]["linear.weight"].isfinite().all()


def test_termination_signal_finishes_the_step_and_saves(tmp_path):
    terminated = partial(interrupted, at=2, by=partial(os.kill, os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, terminated).fit()
    assert stop.value.code == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "last.pth")["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_processes_whose_launcher_was_killed_save_and_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("TAG2MASK_LAUNCHER", "1")
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        trainer(tmp_path).fit()
    assert load_checkpoint(tmp_path / "last.pth")["step"] == 1


def test_weight_zero_means_no_influence_and_does_not_look_trained(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("engine.trainer.LOGGER.info", lines.append)
    plain = trainer(tmp_path / "a")
    with_late = trainer(tmp_path / "b", loss_weights={"fit": 1.0, "late": 0.0})
    plain.fit(), with_late.fit()
    torch.testing.assert_close(plain.method.linear.weight, with_late.method.linear.weight, rtol=0, atol=0)
    assert "late" not in lines[0] and "weight 0: late" in lines[-1]


def test_accumulated_micro_batches_equal_one_batch_for_means_over_images(tmp_path):
    def halves(start):
        for batch in batches(start):
            for part in (slice(0, 2), slice(2, 4)):
                yield {"image": batch["image"][part], "sample_seed": batch["sample_seed"][part]}

    whole = trainer(tmp_path / "a")
    parts = trainer(tmp_path / "b", halves, options=replace(OPTIONS, accumulate=2))
    whole.fit(), parts.fit()
    torch.testing.assert_close(parts.method.linear.weight, whole.method.linear.weight, rtol=0, atol=1e-6)


def test_best_checkpoint_is_the_best_scored_one(tmp_path):
    scores = iter([10.0, 30.0, 20.0, float("nan")])
    options = replace(OPTIONS, eval_every=2)
    trainer(tmp_path, validate=lambda method, step: {"seg": next(scores)}, options=options).fit()
    best = load_checkpoint(tmp_path / "best.pth")
    assert best["step"] == 4 and best["scores"] == {"seg": 30.0}
    run = resume(tmp_path)
    assert run.progress.best == 30.0
    run = trainer(tmp_path)
    run.progress.select = "cam"
    run.restore(last_good(tmp_path))
    assert run.progress.best is None  # it is of another score


@pytest.mark.parametrize("end", ["killed", "stopped"])
@pytest.mark.parametrize("at", [4, 8])
def test_validation_that_did_not_end_is_made_up_for(tmp_path, at, end):
    """Its checkpoint is there already, at the last step too, where nothing else is left to do."""
    options = replace(OPTIONS, eval_every=4, checkpoint_every=100)
    scores, scored = {4: 30.0, 8: 20.0}, []

    def validate(method, step):
        scored.append(step)
        if step == at and scored.count(step) == 1:
            killed() if end == "killed" else os.kill(os.getpid(), signal.SIGTERM)
        return {"seg": scores[step]}

    with pytest.raises((InterruptedError, SystemExit)):
        trainer(tmp_path, validate=validate, options=options).fit()
    for _ in range(2):  # what is scored is not scored again
        resume(tmp_path, validate=validate, options=options).fit()
    assert scored == sorted([4, 8, at])
    assert load_checkpoint(tmp_path / "best.pth")["step"] == 4
    assert load_checkpoint(tmp_path / "last.pth")["best"] == 30.0


def test_weight_that_belongs_to_no_loss_is_refused(tmp_path):
    for weights in ({"fitt": 1.0}, {"fit": 1.0, "fitt": [[0, 0.0], [5, 1.0]]}):
        with pytest.raises(ValueError, match="loss_weights.fitt"):
            trainer(tmp_path, loss_weights=weights).fit()
    assert not (tmp_path / "last.pth").exists()  # at the first step
    trainer(tmp_path, loss_weights={"fit": 1.0, "of_its_base": 0.0}).fit()


def test_losses_that_have_no_weight_are_named(tmp_path, monkeypatch):
    warned, plain = [], Toy.training_step
    monkeypatch.setattr("engine.trainer.LOGGER.warning", warned.append)

    def forgetful(self, batch, step):
        losses, metrics = plain(self, batch, step)
        return {**losses, "new": losses["fit"] * 2, "share": losses["fit"].detach()}, metrics

    monkeypatch.setattr(Toy, "training_step", forgetful)
    trainer(tmp_path).fit()
    assert len(warned) == 1 and "loss_weights.new" in warned[0]


def test_metrics_are_logged_and_never_end_a_run(whole):
    metrics = [line["metrics"] for line in records(whole)]
    assert len(metrics) == 8 and all(m["broken"] is None and math.isfinite(m["level"]) for m in metrics)


@pytest.mark.parametrize(
    ("weights", "class_names", "message"),
    [
        ({"linear.weight": torch.zeros(3, 3, 3)}, ["background", "cat"], "linear.weight"),
        ({"queue": torch.zeros(3)}, ["background", "cat"], "another method"),
        ({}, ["background", "cow"], "cow -> cat"),
        ({}, ["background", "cat", "eel"], "eel"),
    ],
)
def test_checkpoints_of_something_else_are_refused(tmp_path, weights, class_names, message):
    header = {"class_names": ["background", "cat"]}
    trainer(tmp_path, header=header).fit()
    path, state = last_good(tmp_path)
    other = {**state, "model": {**state["model"], **weights}, "class_names": class_names}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, header=header).restore(Checkpoint(path, other))
    with pytest.raises(ValueError, match="not those of ours"):
        trainer(tmp_path).restore(Checkpoint(path, {"model": {"proj.weight": torch.zeros(3)}}))


def test_other_images_are_named(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("engine.checkpoint.LOGGER.warning", warned.append)
    old, new = ({"provenance": {"data_fingerprint": name}} for name in "ab")
    trainer(tmp_path, header=old).fit()
    resume(tmp_path, header=old)
    assert not warned
    resume(tmp_path, header=new)
    assert len(warned) == 1 and "a -> b" in warned[0]


def test_scores_and_checkpoints_are_of_the_average_and_a_resume_equals_an_uninterrupted_run(tmp_path):
    options = replace(OPTIONS, ema=0.5)
    scored = []

    def validate(method, step):
        scored.append(method.linear.weight.clone())
        return {"seg": 1.0}

    run = trainer(tmp_path / "whole", validate=validate, options=options)
    run.fit()
    state = load_checkpoint(tmp_path / "whole" / "last.pth")
    assert torch.equal(state["model"]["linear.weight"], scored[-1])
    assert torch.equal(state["trained"]["linear.weight"], run.method.linear.weight)
    assert not torch.equal(state["trained"]["linear.weight"], scored[-1])
    assert state["model"]["seen"] == 8

    def cut(start):
        return interrupted(start, at=4, by=killed)

    with pytest.raises(InterruptedError):
        trainer(tmp_path / "cut", cut, options=options).fit()
    resume(tmp_path / "cut", options=options, validate=validate).fit()
    for name in ("model", "trained"):
        torch.testing.assert_close(
            load_checkpoint(tmp_path / "cut" / "last.pth")[name], state[name], rtol=0, atol=0
        )
