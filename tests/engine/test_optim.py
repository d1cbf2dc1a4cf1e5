"""The published learning-rate schedule and optimiser."""

import pytest
import torch
from torch import nn

from engine.optim import build_optimizer, poly_warmup_factor, set_learning_rate


def published(name):
    # Base rates of encoder, encoder norms, heads, decoder (spec of the published programs: heads and decoder
    # x 10).
    steps = {"voc": 20000, "coco": 80000}[name]
    return [1.0, 1.0, 10.0, 10.0], {"steps": steps, "warmup_steps": 1500, "warmup_ratio": 1e-6, "power": 0.9}


def test_learning_rate_matches_reference_values(golden):
    case = golden("vit_lr")
    for name in ("voc", "coco"):
        scales, schedule = published(name)
        params = [nn.Parameter(torch.zeros(1)) for _ in scales]
        optimizer = build_optimizer(
            [{"name": str(i), "params": [p], "lr_scale": s} for i, (p, s) in enumerate(zip(params, scales))],
            lr=6e-5,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            eps=1e-8,
        )
        for step, expected in zip(case[f"{name}/iters"].tolist(), torch.as_tensor(case[f"{name}/lr"])):
            set_learning_rate(optimizer, poly_warmup_factor(step, **schedule))
            rates = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
            torch.testing.assert_close(rates, expected.double(), rtol=1e-9, atol=0)


def test_adamw_trajectory_matches_reference_values(golden):
    case = golden("vit_lr")
    parameter = nn.Parameter(case.arr("adamw/p", (6,)).clone())
    optimizer = build_optimizer(
        [{"name": "all", "params": [parameter], "lr_scale": 1.0}],
        lr=6e-3,
        weight_decay=0.01,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    for step, expected in enumerate(torch.as_tensor(case["adamw/trajectory"])):
        set_learning_rate(
            optimizer, poly_warmup_factor(step, steps=8, warmup_steps=3, warmup_ratio=1e-6, power=0.9)
        )
        parameter.grad = case.arr(f"adamw/g{step}", (6,))
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_left_out():
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    optimizer = build_optimizer(
        [
            {"name": "a", "params": [frozen], "lr_scale": 1.0},
            {"name": "b", "params": [nn.Parameter(torch.ones(1)), frozen], "lr_scale": 10.0},
        ],
        lr=0.1,
        weight_decay=0.5,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    assert [(g["name"], len(g["params"]), g["base_lr"]) for g in optimizer.param_groups] == [("b", 1, 1.0)]


def test_sgd_with_polynomial_rate_matches_reference_values(golden):
    """IRN, PSA and SEAM: no warm-up, the last rate stays, and the momentum is as small as the decay."""
    case = golden("ms_poly_sgd")
    inputs, last = case.meta["inputs"], int(case.meta["max_step"])
    w0, w1 = (nn.Parameter(case.arr(inputs[k]["name"], inputs[k]["shape"]).clone()) for k in ("w0", "w1"))
    decay = case.meta["weight_decay"][0]
    optimizer = build_optimizer(
        [
            {"name": "old", "params": [w0], "lr_scale": 1.0},
            {"name": "new", "params": [w1], "lr_scale": 10.0, "decay_scale": 0.0},
        ],
        name="sgd",
        lr=case.meta["lr"],
        weight_decay=decay,
        momentum=decay,
    )
    for step, (rates, first, second) in enumerate(zip(case["lrs"], case["w0_traj"], case["w1_traj"])):
        set_learning_rate(
            optimizer, poly_warmup_factor(step, steps=last, warmup_steps=0, warmup_ratio=1.0, power=0.9)
        )
        torch.testing.assert_close(
            torch.tensor([g["lr"] for g in optimizer.param_groups]), rates.float(), rtol=1e-6, atol=0
        )
        optimizer.zero_grad()
        (0.5 * w0.square().sum() + 0.1 * w1.square().sum()).backward()
        optimizer.step()
        torch.testing.assert_close(w0.detach(), first, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(w1.detach(), second, rtol=1e-6, atol=1e-6)


def test_an_unknown_optimiser_is_refused():
    group = {"name": "all", "params": [nn.Parameter(torch.ones(1))], "lr_scale": 1.0}
    with pytest.raises(ValueError, match="no optimiser 'adam'.*did you mean 'adamw'"):
        build_optimizer([group], name="adam", lr=0.1, weight_decay=0.0)
