"""MCC: the authors' masks, flags and training steps, and that leaving hidden tokens out changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch.testing import assert_close

from losses.contrastive import class_token_contrast
from methods.mcc import MCC, masked_class_token, visible_flags
from models.backbones import create_backbone
from models.backbones.vit import LAYER_NORM
from ops.cam import present_classes
from ops.labels import region_mask
from tests.methods.authors import masked_tokens
from tests.methods.demo import demo_batch, demo_method
from tests.recorded import recorded


class Replay(MCC):
    """Random draws come from the recorded case."""

    case = None

    def hidden_cells(self, batch, i, grid):
        draws = range(self.num_masks * i, self.num_masks * (i + 1))
        return torch.stack([self.case.bernoulli(f"mccmask/u{n}", grid, self.mask_rate) for n in draws])


@recorded("vit_mcc_parts")
def test_parts_match_reference_values(case):
    check_masks(case)
    check_bicubic(case)
    check_block(case)
    rows, width = len(case["loss_grad"]), case.setting("width|dim|d", 64, "mccloss")
    teachers = case.setting("teachers", 2 * len(case["y"]))
    student = (0.2 * case.arr("mccloss/s", (rows, width))).requires_grad_()
    teacher = 0.2 * case.arr("mccloss/t", (teachers, width))
    temperature = case.setting("temperature|temp", 0.5)
    loss = class_token_contrast(student, teacher, case["flags"], temperature)
    case.compare("loss", loss)
    (grad,) = torch.autograd.grad(loss, student)
    case.compare("loss_grad", grad[:, ::2], rtol=1e-4, atol=1e-7)


def check_masks(case):
    b, count, h, w = case["masks"].shape
    low, high = case.setting("low_threshold|low", 0.25), case.setting("high_threshold|high", 0.7)
    options = {
        "mask_rate": case.setting("mask_rate", 0.95),
        "mask_scale": case.setting("mask_scale|scale", 4),
    }
    method = demo_method(Replay, num_masks=count, low_threshold=low, high_threshold=high, **options)
    method.case = case
    masks = method.sample_masks({"image": torch.empty(b)}, (h, w))
    case.same("masks", masks)
    case.same("n_calls", b * count)
    class_label = case["y"].float()
    cam = case.smooth_cams("mccmask/cam", b, class_label.shape[1], h, w, 8, 3)
    flags = visible_flags(region_mask(cam, class_label, low, high), masks, 0.2)
    case.same("flags", flags)
    present = present_classes(class_label)
    # Resized to its own size, so unchanged.
    assert torch.equal(method.visible_objects(present.select(cam), present, masks), flags)


def check_bicubic(case):
    _, classes, h, w = case["bicubic"].shape
    size = case.setting("bicubic_size|big_size|big", (16 * h, 16 * w))[-2:]
    cam = case.smooth_cams("mccmask/big", 1, classes, *size, 16)
    resized = F.interpolate(cam, size=(h, w), mode="bicubic", align_corners=False)
    case.compare("bicubic", resized)
    # The method resizes the same way: masks that show one token each read its region.
    method, one_class = (
        demo_method(MCC, low_threshold=0.3, high_threshold=0.6),
        present_classes(torch.ones(1, 1)),
    )
    masks = ~torch.eye(h * w, dtype=torch.bool).view(1, h * w, h, w)
    flags = method.visible_objects(cam[:, :1], one_class, masks)
    assert torch.equal(flags[0, 2:], (case["bicubic"][0, 0].flatten() > 0.3).float())


def check_block(case):
    policy, (b, length, width) = case["block/policy"], case["block/out"].shape
    heads = case.setting("heads|num_heads", 4, "block")
    block = Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=LAYER_NORM)
    case.load_weights(block, "mccblk/")
    x = case.arr("mccblk/x", (b, length, width)).requires_grad_()
    visible = (policy == 0)[:, None, None]
    out = block(x, attn_mask=visible)
    case.compare("block/out", out)
    (grad,) = torch.autograd.grad((out**2).mean(), x)
    case.compare("block/grad", grad[:, :, ::4], rtol=1e-4, atol=0, share=1e-5)
    q, k, _ = block.attn.qkv(block.norm1(x)).view(b, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT * block.attn.scale).masked_fill(~visible, -torch.inf)
    case.compare("block/attn", logits.softmax(-1)[:, ::2])


@pytest.mark.parametrize("hidden", [0.0, 0.5, 0.9, 1.0])
def test_leaving_hidden_tokens_out_equals_masking_them(hidden):
    torch.manual_seed(0)
    backbone = create_backbone("vit_demo", width=32, depth=3, heads=2, image_size=48).double()
    image = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    masks = torch.rand(2, 4, 6, 5) < hidden
    tokens = masked_class_token(backbone, image, masks)  # view-major
    repeated = image.repeat(4, 1, 1, 1)
    expected, _ = masked_tokens(backbone, repeated, masks.transpose(0, 1).flatten(0, 1))
    assert_close(tokens, expected)
    weights = torch.randn_like(tokens)
    short, full = (
        torch.autograd.grad((x * weights).sum(), list(backbone.parameters())) for x in (tokens, expected)
    )
    assert_close(short, full)


def test_masks_belong_to_the_sample_and_leave_the_random_state_alone():
    method, batch = demo_method(MCC, num_masks=4), demo_batch()
    before = torch.get_rng_state()
    masks = method.sample_masks(batch, (6, 6))
    assert torch.equal(torch.get_rng_state(), before)
    alone = method.sample_masks({key: value[2:] for key, value in batch.items()}, (6, 6))
    assert torch.equal(alone, masks[2:])
    assert not torch.equal(masks[0], masks[1])
    cells = masks[:, :, ::2, ::2]
    assert torch.equal(cells.repeat_interleave(2, 2).repeat_interleave(2, 3), masks)
