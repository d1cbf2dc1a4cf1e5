"""SeCo's contrastive losses: parity with the authors' values, and what must hold for any input."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from losses.tag_contrast import MIXED, local_to_global_contrast, local_to_local_contrast
from tests.recorded import recorded

# rows, queue, width, classes, kind
CASES = {
    "a": (24, 96, 32, 20, "mixed"),
    "b": (24, 600, 32, 20, "revise"),
    "c": (12, 60, 16, 80, "allneg"),
    "d": (24, 240, 32, 20, "bkgonly"),
}


def unit(x):
    return F.normalize(x, dim=-1)


def contrast_case(case, tag):
    """Query, keys (current ones and queue), their tags, and raw prototypes."""
    rows, size, width, classes, kind = case.setting(tag, CASES.get(tag, CASES["a"]))
    rows, size = len(case[f"{tag}/flags_in"]), len(case[f"{tag}/qflags"])
    if f"{tag}/lil_grad" in case:
        width = case[f"{tag}/lil_grad"].shape[1]
    width = case.setting("width|dim|d", width, tag)
    classes, kind = case.setting("classes|num_classes", classes, tag), case.setting("kind|mode", kind, tag)
    parts = (("q", rows), ("k", rows), ("queue", size))
    query, keys, queue = (unit(case.arr(f"seco/{tag}/{part}", (n, width))) for part, n in parts)
    tags = case.ints(f"seco/{tag}/flags", (rows, 1), 6) - 1
    queue_tags = case.ints(f"seco/{tag}/qflags", (size, 1), 6) - 1
    if kind == "revise":
        kept = case.arr(f"seco/{tag}/qkeep", (size, 1), 0.0, 1.0) >= 0.99
        queue_tags = torch.where(kept, queue_tags, 2)
        tags[::2] = 2
        base = unit(case.arr(f"seco/{tag}/base", (1, width)))
        queue = unit(queue * 0.02 + base)
        keys = unit(keys * 0.3 - base)
        far = torch.arange(size) % 100 == 0
        queue[far] = unit(query[:1] + 0.1 * queue[far])
    elif kind == "allneg":
        tags[:] = MIXED
    elif kind == "bkgonly":
        tags[:] = 0
    case.same(f"{tag}/flags_in", tags)
    case.same(f"{tag}/qflags", queue_tags)
    tags, queue_tags = tags[:, 0], queue_tags[:, 0]
    prototypes = case.arr(f"seco/{tag}/proto", (classes, width))
    return query.requires_grad_(), torch.cat([keys, queue]), tags, torch.cat([tags, queue_tags]), prototypes


def check_gradient(case, entry, loss, query):
    """Nothing is recorded where the loss has no gradient."""
    (grad,) = torch.autograd.grad(loss, query)
    if entry in case:
        case.compare(entry, grad, rtol=1e-4, atol=0, share=1e-5)
    else:
        assert not grad.any()


@recorded("vit_seco_losses")
def test_contrasts_match_reference_values_and_gradients(case):
    for tag in case.tags():
        query, keys, tags, key_tags, prototypes = contrast_case(case, tag)
        lil_temperature, lig_temperature = case[f"{tag}/temps"].tolist()
        before = tags.clone()
        lil, revised = local_to_local_contrast(query, keys, tags, key_tags, lil_temperature)
        case.compare(f"{tag}/lil", lil, rtol=1e-4, atol=1e-7)
        check_gradient(case, f"{tag}/lil_grad", lil, query)
        case.same(f"{tag}/flags_revised", revised[:, None])
        assert torch.equal(tags, before)
        for name, rows in (("raw", prototypes), ("norm", unit(prototypes))):
            lig = local_to_global_contrast(query, rows, revised, lig_temperature)
            case.compare(f"{tag}/lig_{name}", lig, rtol=1e-4, atol=1e-7)
            check_gradient(case, f"{tag}/lig_{name}_grad", lig, query)
    case.irrelevant("*/inplace")  # the authors' program changes its caller's tags


def random_case(rows=24, size=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, keys, queue = (unit(torch.randn(n, 16, generator=generator)) for n in (rows, rows, size))
    tags = torch.randint(-1, classes + 1, (rows,), generator=generator)
    queue_tags = torch.randint(-1, classes + 1, (size,), generator=generator)
    return query.requires_grad_(), torch.cat([keys, queue]), tags, torch.cat([tags, queue_tags])


def test_mixed_tokens_take_no_part():
    query, keys, tags, key_tags = random_case()
    mixed = (key_tags == MIXED)[:, None]
    # The row's maximum is left out of the sum, so a mixed key must never be it.
    keys = torch.where(mixed, -unit(query.detach().mean(0)), keys)
    loss, _ = local_to_local_contrast(query, keys, tags, key_tags, 0.5)
    (grad,) = torch.autograd.grad(loss, query)
    assert not grad[tags == MIXED].any() and grad[tags != MIXED].any()
    highest = (query @ keys.T).argmax(1)
    assert (key_tags[highest] != MIXED).all()
    others = torch.where(mixed, 0.5 * keys, keys)
    lil, _ = local_to_local_contrast(query, others, tags, key_tags, 0.5)
    assert (key_tags[(query @ others.T).argmax(1)] != MIXED).all()
    assert_close(lil, loss, rtol=0, atol=0)


@pytest.mark.parametrize("tag", [MIXED, 0])
def test_batches_without_a_class_are_finite(tag):
    query, keys, tags, key_tags = random_case()
    tags[:] = tag
    key_tags[: len(tags)] = tag
    lil, revised = local_to_local_contrast(query, keys, tags, key_tags, 0.08)
    lig = local_to_global_contrast(query, unit(torch.randn(5, 16)), revised, 0.1)
    (lil + lig).backward()
    assert lil.isfinite() and lig == 0 and query.grad.isfinite().all()
    assert (lil == 0) == (tag == MIXED)


@pytest.mark.parametrize("temperature", [0.5, 1.55])  # far above 0, and 0.5
def test_rows_whose_bracket_is_not_negative_are_dropped(temperature):
    query = torch.tensor([[1.0, 0.0]])
    keys, tags = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1, 1, 2])
    loss, _ = local_to_local_contrast(query, keys, tags[:1], tags, temperature)
    assert loss == 0


def test_a_copy_counts_like_a_second_key():
    query, keys, tags, key_tags = random_case()
    keys[: len(query) // 2] = query.detach()[: len(query) // 2]  # rows whose maximum occurs twice
    first = torch.arange(len(query))
    once, revised = local_to_local_contrast(query, keys, tags, key_tags, 0.2, first)
    keys, key_tags = (torch.cat([x[: len(query)], x]) for x in (keys, key_tags))
    twice, revised_twice = local_to_local_contrast(query, keys, tags, key_tags, 0.2)
    assert_close(once, twice, rtol=1e-5, atol=0)
    assert once > 0 and torch.equal(revised, revised_twice)
