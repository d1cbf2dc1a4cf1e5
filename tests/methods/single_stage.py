"""Recorded cases of 1-stage-wseg and WS-FCN: their inputs, weights and stored outputs."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from methods import cnn_base
from methods.cnn_base import SingleStageCNN
from methods.one_stage import OneStage
from methods.published import PROGRAMS
from ops.cam import present_classes
from tests.conftest import GOLDEN, GoldenCase
from tests.formula import formula_array
from utils.image import normalize
from utils.weights import rename_keys


def case_input(case: GoldenCase, tag: str) -> Tensor:
    """An input rebuilt from ``meta``: formula values, or blocks of them with noise."""
    spec = case.meta["inputs"][tag]
    if spec.get("kind") != "blocks":
        x = formula_array(spec["formula_name"], spec["shape"], spec["low"], spec["high"])
        return torch.from_numpy(x if spec["scale"] is None else x * np.float32(spec["scale"]))
    coarse_name, noise_name = spec["formula_name"]
    *front, h, w = spec["shape"]
    cell, low, high = spec["cell"], spec["low"], spec["high"]
    coarse = formula_array(coarse_name, (*front, -(-h // cell), -(-w // cell)), low, high)
    x = coarse.repeat(cell, axis=-2).repeat(cell, axis=-1)[..., :h, :w]
    noise = np.float32(spec["noise"]) * formula_array(noise_name, spec["shape"], -1, 1)
    return torch.from_numpy((x + noise).clip(low, high).astype(np.float32))


def normalized(raw_image: Tensor) -> Tensor:
    """The network's input for colours in [0, 1]."""
    return normalize(255 * raw_image)


def grey_levels(image: Tensor) -> Tensor:
    """(3, H, W) uint8 of colours in [0, 1], as the notes of the cases say."""
    return (255 * image).floor().to(torch.uint8)


def assert_stored(case: GoldenCase, name: str, value: Tensor, rtol: float, atol: float) -> None:
    """Compare with an output that is stored whole, or by every n-th value and its statistics."""
    value = value.detach()
    if name in case:
        assert_close(value.to(case[name].dtype), case[name], rtol=rtol, atol=atol)
        return
    assert list(value.shape) == case[f"{name}__shape"].tolist()
    found = value.reshape(-1)[:: int(case[f"{name}__stride"])]
    assert_close(found.to(case[f"{name}__sub"].dtype), case[f"{name}__sub"], rtol=rtol, atol=atol)
    x = value.double()
    found = torch.stack([x.mean(), x.std(unbiased=False), x.min(), x.max(), x.abs().mean()])
    assert_close(found, case[f"{name}__stats"], rtol=rtol, atol=atol)


def table(name: str):
    """A JSON file among the recorded cases."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def author_names(system: str) -> dict[str, str]:
    """Our names -> the authors', from their list of keys and the rules of a program."""
    program = PROGRAMS[{"wsfcn": "ws_fcn", "onestage": "one_stage"}[system]]
    theirs = [key for key, *_ in table(f"state_dict_{system}")["entries"]]
    theirs = [key for key in theirs if not any(re.search(rule, key) for rule in program["repeats"])]
    return rename_keys(dict(zip(theirs, theirs)), program["rules"].items())


def load_formula_weights(
    case: GoldenCase, module: nn.Module, names: dict[str, str], made: dict[str, Tensor] | None = None
) -> None:
    """Give every entry of a state dict the recorded case's weight of the author's name.

    Args:
        made: weights by the authors' names, to be used again and added to: large networks take seconds.
    """
    state = {}
    made = {} if made is None else made
    scales = case.meta.get("weight_scale", {})
    for key, value in module.state_dict().items():
        theirs = names[key]
        if theirs not in made or made[theirs].shape != value.shape:
            made[theirs] = case.weight(theirs, value.shape)
        state[key] = made[theirs] * scales[theirs] if theirs in scales else made[theirs]
        if theirs == "last_conv.8.bias":
            state[key] = state[key] + case.meta.get("last_conv.8.bias_shift", 0.0)
    module.load_state_dict(state)


def local_names(module: nn.Module, names: dict[str, str], ours: str) -> dict[str, str]:
    """Names of a part of the method, as the part itself calls its entries."""
    return {key: names[f"{ours}.{key}"] for key in module.state_dict()}


def no_dropout(module: nn.Module) -> None:
    """Let every dropout layer pass all."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0


def assert_gradients(
    case: GoldenCase,
    module: nn.Module,
    inputs: list[Tensor],
    outputs: list[Tensor],
    names: dict[str, str],
    suffix: str = "",
    rtol: float = 1e-3,
    atol: float = 1e-8,
) -> None:
    """Gradients of ``sum(output * cotangent) / numel`` with respect to inputs and parameters."""
    total = sum((y * case_input(case, f"cotangent{i}")).sum() / y.numel() for i, y in enumerate(outputs))
    module.zero_grad()
    total.backward()
    for i, x in enumerate(inputs):
        assert_stored(case, f"grad_in{i}{suffix}", x.grad, rtol, atol)
    norms = {names[key]: p.grad.norm().double() for key, p in module.named_parameters()}
    recorded = dict(zip(case.meta["param_names"], case[f"grad_param_norms{suffix}"]))
    unused = set(recorded) - set(norms)
    assert not any(recorded[name] for name in unused)
    for name, norm in norms.items():
        assert_close(norm, recorded[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def all_classes(method: OneStage, image: Tensor, masks: Tensor, class_label: Tensor) -> Tensor:
    """Refined masks (B, K, H, W) with the channels of absent classes as zeros, as the authors have them."""
    present = present_classes(class_label)
    refined = method.refine(image, masks, present)
    out = refined.new_zeros(len(refined), masks.shape[1], *refined.shape[-2:])
    out[:, 0] = refined[:, 0]
    index = present.class_ids[:, :, None, None].expand_as(refined[:, 1:])
    return out.scatter_add(1, index, refined[:, 1:])


class Maps(nn.Module):
    """A small backbone with maps at stride 4 and 8, for tests that need no features."""

    dims, shallow = (6, 12), 0

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.deep = nn.Conv2d(6, 12, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> list[Tensor]:
        shallow = self.stem(image).relu()
        return [shallow, self.deep(shallow).relu()]


def small_method(method_class: type[SingleStageCNN], num_classes: int, **options: Any) -> SingleStageCNN:
    """A method on ``Maps``, with a narrow decoder and everything switched on."""
    torch.manual_seed(0)
    if issubclass(method_class, OneStage):
        weights = {"cls": 1.0, "mask": [[0, 0.0], [1000, 1.0]]}
        options = {"loss_weights": weights, "width": 8, "context_dilations": (2, 3, 4)} | options
    with pytest.MonkeyPatch.context() as patch:
        if "backbone" not in options:
            patch.setattr(cnn_base, "create_backbone", Maps)
        return method_class(num_classes, options.pop("backbone", {}), **options)


def small_batch(num_classes: int, b: int = 2, size: int = 48) -> dict[str, Tensor]:
    """Noise, one tag for each image and two for the first."""
    generator = torch.Generator().manual_seed(0)
    class_label = torch.zeros(b, num_classes - 1)
    class_label[range(b), [i % (num_classes - 1) for i in range(b)]] = 1
    class_label[0, -1] = 1
    return {"image": torch.randn(b, 3, size, size, generator=generator), "class_label": class_label}
