"""The published learning-rate schedule and optimiser."""

import torch
from torch import nn

from engine.optim import build_optimizer, decayed_by_layer, poly_warmup_factor, set_learning_rate
from tests.recorded import recorded

STEPS, WARMUP = "max_iters|max_iter|max_step|max_steps|steps", "warmup_steps|warmup_iters|warmup_iter|warmup"


@recorded("vit_lr")
def test_rates_and_adamw_match_reference_values(case):
    adamw = {"weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    shape = {"warmup_ratio": case.setting("warmup_ratio|ratio", 1e-6), "power": case.setting("power", 0.9)}
    for tag in (tag for tag in case.tags() if f"{tag}/iters" in case):
        # Encoder, its norms, heads, decoder.
        rates = case.setting("base_lr|lr", (6e-5, 6e-5, 6e-4, 6e-4), tag)
        schedule = shape | {
            "steps": case.setting(
                "max_iters|max_iter|max_step|steps", 80000 if tag == "coco" else 20000, tag
            ),
            "warmup_steps": case.setting(WARMUP, 1500, tag),
        }
        groups = [
            {"name": str(i), "params": [nn.Parameter(torch.zeros(1))], "lr_scale": rate / rates[0]}
            for i, rate in enumerate(rates)
        ]
        optimizer = build_optimizer(groups, lr=rates[0], **adamw)
        found = []
        for step in case[f"{tag}/iters"].tolist():
            set_learning_rate(optimizer, poly_warmup_factor(step, **schedule))
            found.append([group["lr"] for group in optimizer.param_groups])
        case.compare(f"{tag}/lr", torch.tensor(found, dtype=torch.float64), rtol=1e-9, atol=0)

    count, width = case["adamw/trajectory"].shape
    parameter = nn.Parameter(case.arr("adamw/p", (width,)).clone())
    adamw["weight_decay"] = case.setting("weight_decay|decay", 0.01, "adamw")
    group = {"name": "all", "params": [parameter], "lr_scale": 1.0}
    optimizer = build_optimizer([group], lr=case.setting("lr", 6e-3, "adamw"), **adamw)
    schedule = shape | {
        "steps": case.setting(STEPS, 8, "adamw"),
        "warmup_steps": case.setting(WARMUP, 3, "adamw"),
    }
    found = []
    for step in range(count):
        set_learning_rate(optimizer, poly_warmup_factor(step, **schedule))
        parameter.grad = case.arr(f"adamw/g{step}", (width,))
        optimizer.step()
        found.append(parameter.detach().clone())
    case.compare("adamw/trajectory", torch.stack(found))


def test_frozen_parameters_are_left_out():
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    groups = [
        {"name": "a", "params": [frozen], "lr_scale": 1.0},
        {"name": "b", "params": [nn.Parameter(torch.ones(1)), frozen], "lr_scale": 10.0},
    ]
    optimizer = build_optimizer(groups, lr=0.1, weight_decay=0.5)
    assert [(g["name"], len(g["params"]), g["base_lr"]) for g in optimizer.param_groups] == [("b", 1, 1.0)]


@recorded("ms_poly_sgd")
def test_sgd_with_polynomial_rate_matches_reference_values(case):
    """IRN, PSA and SEAM: no warm-up, the last rate stays, and the momentum is as small as the decay."""
    w0, w1 = (nn.Parameter(case.input(key)) for key in ("w0", "w1"))
    decay = case.meta["weight_decay"]
    optimizer = build_optimizer(
        [
            {"name": "old", "params": [w0], "lr_scale": 1.0},
            {"name": "new", "params": [w1], "lr_scale": 10.0, "decay_scale": decay[1] / decay[0]},
        ],
        name="sgd",
        lr=case.meta["lr"],
        weight_decay=decay[0],
        momentum=float(case["effective_momentum"][0]),
    )
    schedule = {"warmup_steps": 0, "warmup_ratio": 1.0, "power": case.setting("power|momentum", 0.9)}
    found = []
    for step in range(len(case["lrs"])):
        set_learning_rate(optimizer, poly_warmup_factor(step, steps=case.meta["max_step"], **schedule))
        optimizer.zero_grad()
        (0.5 * w0.square().sum() + 0.1 * w1.square().sum()).backward()
        optimizer.step()
        rates = torch.tensor([group["lr"] for group in optimizer.param_groups])
        found.append((rates, w0.detach().clone(), w1.detach().clone()))
    for name, values in zip(("lrs", "w0_traj", "w1_traj"), zip(*found)):
        case.compare(name, torch.stack(values), rtol=1e-6, atol=0 if name == "lrs" else 1e-6)


def test_groups_are_divided_by_the_layers_of_their_parameters():
    slow, fast, new = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [
        {"name": "backbone", "params": [slow, fast], "lr_scale": 1.0, "decay_scale": 0.0},
        {"name": "heads", "params": [new], "lr_scale": 10.0},
    ]
    optimizer = build_optimizer(decayed_by_layer(groups, {slow: 0.5, fast: 1.0}), lr=0.1, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.05, 0), (0.1, 0), (1.0, 0.1)]
