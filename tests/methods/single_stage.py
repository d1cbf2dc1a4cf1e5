"""Recorded cases of 1-stage-wseg and WS-FCN: their inputs, weights and stored outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from methods import cnn_base
from methods.cnn_base import SingleStageCNN
from methods.one_stage import OneStage
from methods.published import PROGRAMS
from ops.cam import present_classes
from tests.recorded import GOLDEN, GoldenCase
from utils.image import normalize
from utils.weights import rename_keys


def normalized(raw_image: Tensor) -> Tensor:
    """The network's input for colours in [0, 1]."""
    return normalize(255 * raw_image)


def grey_levels(image: Tensor) -> Tensor:
    """(3, H, W) uint8 of colours in [0, 1], as the notes of the cases say."""
    return (255 * image).floor().to(torch.uint8)


def table(name: str):
    """A JSON file among the recorded cases."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def author_names(system: str) -> dict[str, str]:
    """Our names -> the authors', from their list of keys and the rules of a program."""
    program = PROGRAMS[{"wsfcn": "ws_fcn", "onestage": "one_stage"}[system]]
    theirs = [key for key, *_ in table(f"state_dict_{system}")["entries"]]
    theirs = [key for key in theirs if not any(re.search(rule, key) for rule in program["repeats"])]
    return rename_keys(dict(zip(theirs, theirs)), program["rules"].items())


def local_names(module: nn.Module, names: dict[str, str], ours: str) -> dict[str, str]:
    """Names of a part of the method, as the part itself calls its entries."""
    return {key: names[f"{ours}.{key}"] for key in module.state_dict()}


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
    total = sum((y * case.input(f"cotangent{i}")).sum() / y.numel() for i, y in enumerate(outputs))
    module.zero_grad()
    total.backward()
    for i, x in enumerate(inputs):
        case.compare(f"grad_in{i}{suffix}", x.grad, rtol, atol)
    norms = {names[key]: p.grad.norm().double() for key, p in module.named_parameters()}
    recorded = dict(zip(case.meta["param_names"], case[f"grad_param_norms{suffix}"]))
    unused = set(recorded) - set(norms)
    assert not any(recorded[name] for name in unused)
    for name, norm in norms.items():
        assert_close(norm, recorded[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def check_block(
    case: GoldenCase,
    make: Callable[..., nn.Module],
    tags: tuple[str, ...],
    names: dict[str, str],
    ours: str,
    modes: tuple[str, ...] = ("",),
) -> nn.Module:
    """Outputs and gradients of a part of the decoder, in eval mode and, for ``_train``, in training mode.

    Args:
        make: the block, given the channels of its inputs.
        tags: of the inputs.
        ours: its name in our network.
    """
    for suffix in modes:
        inputs = [case.input(tag).requires_grad_() for tag in tags]
        block = make(*(x.shape[1] for x in inputs))
        local = local_names(block, names, ours)
        case.load_author_weights(block, local)
        out = block.train(suffix == "_train")(*inputs)
        # The authors' fusion gives the shallow branch first.
        outputs = [out] if isinstance(out, Tensor) else [*out][::-1]
        for i, value in enumerate(outputs):
            case.compare(f"out{i}{suffix}", value, rtol=1e-4, atol=1e-5)
        assert_gradients(case, block, inputs, outputs, local, suffix)
    return block


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

    dims, strides, shallow = (6, 12), (4, 8), 0

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
