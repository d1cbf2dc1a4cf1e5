"""One loop for all methods: exact resume, clear failures, weights applied by the engine."""

import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from engine.optim import build_optimizer
from engine.trainer import Trainer, TrainOptions
from methods.base import Method
from utils.seed import sample_generator, sample_seed
from utils.weights import load_checkpoint


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
        return losses, {"level": error.detach().mean()}


def batches(start, broken_at=None):
    for step in range(start, 10**6):
        seed = sample_seed(0, 0, step)
        image = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        scale = torch.tensor(float("nan") if step == broken_at else 1.0)
        yield {"image": image, "sample_seed": torch.full((4,), seed), "scale": scale}


OPTIONS = TrainOptions(
    steps=8,
    accumulate=1,
    precision="fp32",
    log_every=3,
    eval_every=100,
    checkpoint_every=4,
    keep_every=None,
    warmup_steps=2,
    warmup_ratio=1e-6,
    power=0.9,
)


def trainer(work_dir, source=batches, validate=None, options=OPTIONS, **method_options):
    torch.manual_seed(0)
    method = Toy(**method_options)
    optimizer = build_optimizer(
        method.parameter_groups(), lr=0.05, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8
    )
    work_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(
        method, optimizer, source, options, work_dir, torch.device("cpu"), {"config": {}}, validate
    )


def recorded_losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], round(line["loss"]["fit"], 6)) for line in lines]


def test_four_steps_and_a_resume_equal_eight_steps(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.fit()

    class KilledError(Exception):
        pass

    def killed(start):
        for step, batch in enumerate(batches(start), start):
            if step == 6:
                raise KilledError
            yield batch

    first = trainer(tmp_path / "parts", killed)
    with pytest.raises(KilledError):
        first.fit()
    second = trainer(tmp_path / "parts")
    second.restore(tmp_path / "parts" / "last.pth")
    assert second.step == 4
    second.fit()
    for key, value in whole.method.state_dict().items():
        torch.testing.assert_close(second.method.state_dict()[key], value, rtol=0, atol=0)
    # The steps that the killed run did after its checkpoint are not in the record twice, and windows are
    # whole.
    assert recorded_losses(tmp_path / "parts") == recorded_losses(tmp_path / "whole")
    lines = [
        json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [3, 6, 8]


def test_loss_that_is_not_finite_names_itself_and_leaves_the_last_checkpoint(tmp_path):
    run = trainer(
        tmp_path,
        lambda start: batches(start, broken_at=5),
        loss_weights={"fit": 1.0, "late": [[0, 0.0], [5, 1.0]]},
    )
    with pytest.raises(
        FloatingPointError,
        match=r"step 5: fit [\d.]+, late nan \(weight changed at this step\); last good.*last.pth",
    ):
        run.fit()
    assert load_checkpoint(tmp_path / "last.pth")["step"] == 4


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = trainer(tmp_path)
    run.save("last.pth")
    with torch.no_grad():
        run.method.linear.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="linear.weight"):
        run.save("last.pth")
    assert load_checkpoint(tmp_path / "last.pth")["model"]["linear.weight"].isfinite().all()


def test_termination_signal_finishes_the_step_and_saves(tmp_path):
    def interrupted(start):
        for step, batch in enumerate(batches(start), start):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, interrupted).fit()
    assert stop.value.code == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "last.pth")["step"] == 3


def test_weight_zero_means_no_influence(tmp_path):
    plain, with_late = (
        trainer(tmp_path / "a"),
        trainer(tmp_path / "b", loss_weights={"fit": 1.0, "late": 0.0}),
    )
    plain.fit(), with_late.fit()
    torch.testing.assert_close(plain.method.linear.weight, with_late.method.linear.weight, rtol=0, atol=0)


def test_accumulated_micro_batches_equal_one_batch_for_means_over_images(tmp_path):
    def halves(start):
        for batch in batches(start):
            for part in (slice(0, 2), slice(2, 4)):
                yield {"image": batch["image"][part], "sample_seed": batch["sample_seed"][part]}

    whole = trainer(tmp_path / "whole")
    parts = trainer(tmp_path / "parts", halves, options=TrainOptions(**{**vars(OPTIONS), "accumulate": 2}))
    whole.fit(), parts.fit()
    torch.testing.assert_close(parts.method.linear.weight, whole.method.linear.weight, rtol=0, atol=1e-6)


def test_best_checkpoint_is_the_best_scored_one(tmp_path):
    scores = iter([10.0, 30.0, 20.0, float("nan")])
    run = trainer(
        tmp_path,
        validate=lambda method, step: {"seg": next(scores)},
        options=TrainOptions(**{**vars(OPTIONS), "eval_every": 2}),
    )
    run.fit()
    best = load_checkpoint(tmp_path / "best.pth")
    assert best["step"] == 4 and best["scores"] == {"seg": 30.0}
    assert load_checkpoint(tmp_path / "last.pth")["best"] == 30.0


def test_a_batch_can_be_overfitted(tmp_path):
    class Fixed(Toy):
        def training_step(self, batch, step):
            error = self.linear(batch["image"]) - batch["image"].sum(1, keepdim=True)
            return {"fit": error.square().mean()}, {}

    run = trainer(tmp_path, options=TrainOptions(**{**vars(OPTIONS), "steps": 1500}))
    run.method.__class__ = Fixed
    first = next(batches(0))
    run.batches = lambda start: iter(lambda: first, None)
    run.fit()
    assert run.method.training_step(first, 0)[0]["fit"] < 1e-3


def test_weight_that_belongs_to_no_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_weights.fitt belongs to no loss of Toy: did you mean 'fit'"):
        trainer(tmp_path, loss_weights={"fitt": 1.0}).fit()
    late = {"fit": 1.0, "fitt": [[0, 0.0], [5, 1.0]]}
    with pytest.raises(ValueError, match="loss_weights.fitt belongs"):
        trainer(tmp_path, loss_weights=late).fit()
    assert not (tmp_path / "last.pth").exists()  # told at the first step
    trainer(tmp_path, loss_weights={"fit": 1.0, "of_its_base": 0.0}).fit()


def test_losses_that_are_no_numbers_or_have_no_weight_are_told(tmp_path, monkeypatch):
    class Forgetful(Toy):
        def training_step(self, batch, step):
            losses, metrics = super().training_step(batch, step)
            return {**losses, "new": losses["fit"] * 2, "share": losses["fit"].detach()}, metrics

    told = []
    monkeypatch.setattr("engine.trainer.LOGGER.warning", told.append)
    run = trainer(tmp_path)
    run.method.__class__ = Forgetful
    run.fit()
    assert len(told) == 1 and "loss new has no method.loss_weights.new" in told[0]
    run = trainer(tmp_path / "other")
    monkeypatch.setattr(Toy, "training_step", lambda self, batch, step: ({"fit": self.linear.weight}, {}))
    with pytest.raises(ValueError, match=r"loss 'fit' of Toy is a tensor of shape \("):
        run.fit()


def test_metrics_are_logged_and_never_end_a_run(tmp_path):
    class Watched(Toy):
        def training_step(self, batch, step):
            losses, _ = super().training_step(batch, step)
            return losses, {
                "broken": losses["fit"].detach() * math.nan,
                "step": losses["fit"].new_tensor(step),
            }

    run = trainer(tmp_path)
    run.method.__class__ = Watched
    run.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    metrics = [line["metrics"] for line in lines if "metrics" in line]
    assert [set(m) for m in metrics] == [{"broken", "step"}] * len(metrics) and metrics
    assert run.step == OPTIONS.steps and metrics[-1]["step"] <= run.step


def test_checkpoint_without_optimizer_gives_its_weights(tmp_path):
    source = trainer(tmp_path)
    source.fit()
    torch.save({"model": source.method.state_dict()}, tmp_path / "converted.pth")
    run = trainer(tmp_path / "new")
    run.method.linear.weight.data.zero_()
    run.restore(tmp_path / "converted.pth")
    assert run.step == 0
    torch.testing.assert_close(run.method.linear.weight, source.method.linear.weight)


def test_weights_of_something_else_are_refused(tmp_path):
    own = trainer(tmp_path).method.state_dict()
    for state, message in (
        ({"proj.weight": torch.zeros(3)}, "no name is the same.*tools/convert_weights.py"),
        ({**own, "linear.weight": torch.zeros(3, 3, 3)}, r"'linear.weight': \(3, 3, 3\), not"),
    ):
        torch.save({"model": state}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).restore(tmp_path / "other.pth")


def test_a_whole_checkpoint_of_another_method_is_refused(tmp_path):
    trainer(tmp_path).fit()
    state = load_checkpoint(tmp_path / "last.pth")
    state["model"]["queue"] = torch.zeros(3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"another method: Toy has no place for 1 of its weights, first 'queue'"
    ):
        trainer(tmp_path).restore(tmp_path / "other.pth")


def test_other_classes_do_not_go_on_and_other_images_are_told(tmp_path, monkeypatch):
    def run(names, fingerprint):
        made = trainer(tmp_path)
        made.header = {"class_names": names, "provenance": {"data_fingerprint": fingerprint}}
        return made

    run(["background", "cat", "dog"], "a").fit()
    with pytest.raises(ValueError, match="other classes .cat -> cow.: restore the tags .*convert_weights"):
        run(["background", "cow", "dog"], "a").restore(tmp_path / "last.pth")
    with pytest.raises(ValueError, match="other classes .3 with background, now 4."):
        run(["background", "cat", "dog", "eel"], "a").restore(tmp_path / "last.pth")
    told = []
    monkeypatch.setattr("engine.trainer.LOGGER.warning", told.append)
    run(["background", "cat", "dog"], "a").restore(tmp_path / "last.pth")
    assert not told
    run(["background", "cat", "dog"], "b").restore(tmp_path / "last.pth")
    assert len(told) == 1 and "other images, tags or masks" in told[0] and "a -> b" in told[0]


def test_processes_whose_launcher_was_killed_save_and_stop(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.trainer.LAUNCHER", -1)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        trainer(tmp_path).fit()
    assert load_checkpoint(tmp_path / "last.pth")["step"] == 1


def test_a_finished_run_taken_to_another_folder_is_saved_there(tmp_path):
    trainer(tmp_path / "a").fit()
    run = trainer(tmp_path / "b")
    run.restore(tmp_path / "a/last.pth")
    run.fit()
    assert load_checkpoint(tmp_path / "b/last.pth")["step"] == 8


def test_the_best_of_another_score_is_forgotten(tmp_path):
    run = trainer(tmp_path, validate=lambda method, step: {"seg": 70.0, "cam": 50.0})
    run.fit()
    assert load_checkpoint(tmp_path / "last.pth")["best"] == 70.0
    run = trainer(tmp_path)
    run.select = "cam"
    run.restore(tmp_path / "last.pth")
    assert run.best is None


@pytest.mark.parametrize("killed_at", [4, 8])
def test_validation_that_was_killed_is_made_up_for(tmp_path, killed_at):
    """Its checkpoint is there already, at the last step too, where nothing else is left to do."""
    options = TrainOptions(**{**vars(OPTIONS), "eval_every": 4, "checkpoint_every": 100})
    scores, scored = {4: 30.0, 8: 20.0}, []

    def validate(method, step):
        scored.append(step)
        if step == killed_at and scored.count(step) == 1:
            raise KeyboardInterrupt
        return {"seg": scores[step]}

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, validate=validate, options=options).fit()
    for _ in range(2):  # what is scored is not scored again
        run = trainer(tmp_path, validate=validate, options=options)
        run.restore(tmp_path / "last.pth")
        run.fit()
    assert scored == sorted([4, 8, killed_at])
    assert load_checkpoint(tmp_path / "best.pth")["step"] == 4
    assert load_checkpoint(tmp_path / "last.pth")["best"] == 30.0
