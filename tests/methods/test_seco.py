"""SeCo: the authors' tags, memories and training steps; the same numbers in every run and on any machines."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from losses.tag_contrast import MIXED
from methods.seco import SeCo, category_tags
from models.heads import ProjectionHead
from models.memory import moved_prototypes, update_momentum_copy
from ops.cam import present_classes
from ops.crops import crop_positions, cut
from ops.labels import cam_to_confident_label, ignore_outside_box
from tests.formula import stats
from tests.methods.demo import demo_batch, demo_method
from tests.processes import in_a_group
from tests.recorded import recorded
from utils.distributed import init_process_group

# -- decomposition


@recorded("vit_seco_tags")
def test_tags_and_crops_match_reference_values(case):
    class_label, method = case["y"].float(), demo_method(SeCo)
    b, h, w = case["roi"].shape
    low, high = case.setting("low_threshold|low", 0.25), case.setting("high_threshold|high", 0.7)
    cam = case.smooth_cams("tags/cam", b, class_label.shape[1], h, w, case.setting("cell", 40), 3)
    cam[case.setting("weak_image", 3)] *= 0.2
    label = cam_to_confident_label(cam, class_label, low, high, uncertain=MIXED)
    label = ignore_outside_box(label, case["box"])
    case.same("roi", label)
    size, count = case.setting("crop_size|size", 64), case["positions"].shape[1]
    threshold = case.setting("tag_threshold|threshold", 0.2)
    for prefix in ("", "inj_"):
        candidates = []

        def order(n, prefix=prefix, candidates=candidates):
            candidates += n.tolist()
            if not prefix:
                return method.crop_order({}, n)[:, :count]
            drawn = [case.permutation(f"tags/perm{i}", int(k))[:count] for i, k in enumerate(n)]
            return torch.stack(drawn)

        method.num_local_crops = count
        positions = crop_positions(label == MIXED, size, count, order)
        case.same(f"{prefix}positions", positions)
        case.same("perm_sizes", candidates)
        case.same(f"{prefix}flags", category_tags(label, positions, size, threshold))
        if not prefix:
            crops = cut(case.coordinate_image("tags/img", b, h, w), positions, size)  # (V, B, 3, s, s)
            case.compare("crop_abs_sums", crops[:, :, 2].abs().sum((2, 3)).T, rtol=1e-5, atol=1e-3)


def test_crops_come_from_a_private_generator():
    batch, n = {"sample_seed": torch.tensor([4, 4, 5])}, torch.tensor([50, 50, 50])
    fixed, sample = demo_method(SeCo), demo_method(SeCo, follow="paper")
    state = torch.get_rng_state()
    orders = [method.crop_order(batch, n) for method in (fixed, sample)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    published = torch.randperm(50)[: fixed.num_local_crops]
    assert all(torch.equal(order, published) for order in orders[0])
    assert torch.equal(orders[1][0], orders[1][1])
    assert not torch.equal(orders[1][0], orders[1][2])


def test_tags_can_count_pixels_instead_of_class_numbers():
    label = torch.zeros(1, 16, 16, dtype=torch.int64)
    label[0, :2, :4] = 7  # 8 of 64 pixels of the first crop
    positions = torch.tensor([[[0, 0], [8, 8]]])
    assert category_tags(label, positions, 8).tolist() == [[7, 7, 7, 0]]
    assert category_tags(label, positions, 8, follow="paper").tolist() == [[7, 7, 0, 0]]


def test_images_without_confident_class_are_tagged_by_choice():
    label = torch.zeros(2, 16, 16, dtype=torch.int64)
    label[1] = MIXED
    positions = torch.tensor([[[0, 0]], [[4, 4]]])
    assert category_tags(label, positions, 8).tolist() == [[1, 1, 0], [1, 1, MIXED]]
    without = category_tags(label, positions, 8, follow="paper")
    assert without.tolist() == [[MIXED] * 2 + [0], [MIXED] * 3]


def test_crops_are_centred_on_uncertain_pixels_or_anywhere_in_the_image():
    batch = {"valid_box": torch.tensor([[0, 48, 0, 30]]), "sample_seed": torch.tensor([0])}
    present = present_classes(torch.ones(1, 1))
    cam = torch.zeros(1, 1, 48, 48)
    cam[:, :, 14:20, 13:17] = 0.5
    centres = {}
    for follow in ("program", "paper"):
        method = demo_method(SeCo, follow=follow, local_crop_size=8, num_local_crops=20)
        centres[follow] = method.decompose(batch, cam, present)[0] + 4  # (1, 20, 2)
    rows, columns = centres["program"].unbind(-1)
    assert (cam[0, 0, rows, columns] == 0.5).all()
    rows, columns = centres["paper"].unbind(-1)
    assert (columns < 30).all() and (cam[0, 0, rows, columns] == 0).float().mean() > 0.5


# -- prototypes, queue, teacher


@recorded("vit_seco_state")
def test_memories_match_reference_values(case):
    classes, width = case["proto_after0"].shape
    prototypes = case.arr("buf/proto", (classes, width))
    momentum = case.setting("proto_m|prototype_momentum|proto_momentum", 0.9)
    for i in range(len(case.starting("proto_labels"))):
        labels = case[f"proto_labels{i}"]
        tokens = 3 * case.arr(f"buf/emb{i}", (len(labels), width))
        is_class = (labels[:, None] == torch.arange(1, classes + 1)).float()
        prototypes = moved_prototypes(prototypes, tokens, is_class, momentum)
        case.compare(f"proto_after{i}", prototypes)

    size = len(case["queue_sum_after0"])
    rows = case.setting("batch_rows|keys|rows", int(case["ptr_after0"]) or 24)
    method = demo_method(SeCo, queue_size=size)
    method.queue = case.arr("buf/queue", (size, width))
    start = F.normalize(method.queue, dim=0)
    case.compare("queue0_normalised_dim0_stats", stats(start))
    for i in range(1 + max(int(key.removeprefix("ptr_after")) for key in case.starting("ptr_after"))):
        keys = F.normalize(case.arr(f"buf/key{i}", (rows, width)), dim=-1)
        method.remember(keys, case.ints(f"buf/kl{i}", (rows, 1), 7)[:, 0] - 1)
        case.compare(f"queue_sum_after{i}", method.queue.sum(1))
        case.same(f"queue_flags_after{i}", method.queue_tags)
        case.same(f"ptr_after{i}", method.queue_ptr)

    heads = [ProjectionHead(width, bottleneck_dim=768, out_dim=None) for _ in range(2)]
    for head, prefix in zip(heads, ("buf/head/", "buf/head_t/")):
        case.load_weights(head, prefix)
    for _ in range(case.setting("ema_updates|updates", 2)):
        update_momentum_copy(heads[1:], heads[:1], float(case["momentum"]))
    for name, value in heads[1].state_dict().items():
        case.compare(f"ema/{name}_stats", stats(value))
    case.compare("ema/mlp.4.bias", heads[1].mlp[4].bias[: len(case["ema/mlp.4.bias"])])
    case.irrelevant("ema/last_layer.*")  # no value passes through it


def test_queue_is_a_ring_of_any_size():
    method = demo_method(SeCo, queue_size=10)
    expected = []
    for number in (4, 4, 4, 1, 10, 23, 3):
        keys = torch.randn(number, 32)
        tags = torch.arange(number)
        new = method.remember(keys, tags)
        expected = [*expected, *zip(keys.tolist(), tags.tolist())][-10:]
        assert torch.equal(method.queue[new], keys[-10:])
    order = (method.queue_ptr + torch.arange(10)) % 10
    assert torch.equal(method.queue[order], torch.tensor([key for key, _ in expected]))
    assert method.queue_tags[order, 0].tolist() == [tag for _, tag in expected]


# -- whole steps


def test_prototypes_wait_for_their_step():
    method, batch = demo_method(SeCo, prototype_from_step=1), demo_batch(4)
    start = method.prototypes.clone()
    method(batch, 0)
    assert torch.equal(method.prototypes, start)
    method(batch, 1)
    assert_close(method.prototypes.norm(dim=1), torch.ones(5))
    assert not torch.equal(F.normalize(start, dim=1)[1], method.prototypes[1])  # the only class of image 1
    assert_close(F.normalize(start, dim=1)[4], method.prototypes[4])  # class of none


# -- several processes


def two_steps(part):
    """Losses and a gradient of two steps on a part of the batch, and the memories after them."""
    method, batch = demo_method(SeCo, queue_size=50, cam_scales=(1.0,)), demo_batch(4)
    batch = {key: value[part] for key, value in batch.items()}
    # Mirrored: a key that the queue holds twice would be a row's maximum or not by its last bit.
    method({key: value.flip(-1) if value.ndim == 4 else value for key, value in batch.items()}, 0)
    losses, _ = method(batch, 1)
    sum(losses.values()).backward()
    grad = method.proj_head.mlp[0].weight.grad
    memories = {key: value.clone() for key, value in method.named_buffers()}
    return {key: value.item() for key, value in losses.items()}, grad, memories


def half_of_two_steps(rank):
    init_process_group("cpu")
    losses, grad, memories = two_steps(slice(2 * rank, 2 * rank + 2))
    return losses, grad.numpy(), {key: value.numpy() for key, value in memories.items()}


def test_two_processes_learn_and_remember_what_one_does():
    losses, grad, memories = two_steps(slice(None))
    parts = in_a_group(half_of_two_steps)
    for name in losses:
        assert sum(part[0][name] for part in parts) / 2 == pytest.approx(losses[name], rel=1e-4), name
    mean_grad = sum(torch.from_numpy(part[1]) for part in parts) / 2
    assert_close(mean_grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())
    for key, value in memories.items():
        first, second = (torch.from_numpy(part[2][key]) for part in parts)
        assert torch.equal(first, second), key
        assert_close(first, value, rtol=1e-4, atol=1e-5)
