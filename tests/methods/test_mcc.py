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
from ops.cam import present_classes, region_mask
from tests.formula import stats
from tests.methods.authors import author_name

TIGHT = dict(rtol=1e-5, atol=1e-6)
DEMO = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48}
WEIGHTS = {"cls": 1, "cls_aux": 1, "aff": 0.2, "mcc": 0.5, "seg": 0.1}


class RecordedMCC(MCC):
    """Random draws come from the recorded case; intermediate values are kept."""

    case = None
    name = "step"

    def hidden_cells(self, batch, i, grid):
        draws = range(self.num_masks * i, self.num_masks * (i + 1))
        return torch.stack([self.case.bernoulli(f"{self.name}/u{n}", grid, self.mask_rate) for n in draws])

    def visible_objects(self, cam, present, masks):
        self.masks, self.flags = masks, super().visible_objects(cam, present, masks)
        return self.flags

    def training_cams(self, *args):
        self.cams = super().training_cams(*args)
        return self.cams

    def pseudo_label(self, *args):
        self.label = super().pseudo_label(*args)
        return self.label

    def token_label(self, *args):
        self.tokens = super().token_label(*args)
        return self.tokens

    def teach(self, *args):
        self.teacher_out = super().teach(*args)
        return self.teacher_out


def demo_method(kind=MCC, **options):
    torch.manual_seed(0)
    options = {
        "loss_weights": WEIGHTS,
        "head": {"hidden_dim": 32},
        "mask_rate": 0.7,
        "mask_scale": 2,
    } | options
    return kind(6, DEMO, **options)


def demo_batch(b=3, size=48, classes=5):
    generator = torch.Generator().manual_seed(0)
    names = ("image", "global_view", "strong_view")
    views = {name: torch.randn(b, 3, size, size, generator=generator) for name in names}
    class_label = torch.zeros(b, classes)
    class_label[range(b), range(b)] = 1
    class_label[0, 2] = 1
    box = torch.tensor([[0, size, 0, size]]).repeat(b, 1)
    return views | {"class_label": class_label, "valid_box": box, "sample_seed": torch.arange(b)}


def test_masks_and_flags_match_reference_values(golden):
    case = golden("vit_mcc_parts")
    b, count, h, w = case["masks"].shape
    scale = case.setting("mask_scale", 4)
    method = demo_method(
        RecordedMCC, num_masks=count, mask_rate=case.setting("mask_rate", 0.95), mask_scale=scale
    )
    method.case, method.name = case, "mccmask"
    masks = method.sample_masks({"image": torch.empty(b)}, (h, w))
    assert torch.equal(masks, case["masks"].bool())
    class_label = case["y"].float()
    cam = case.smooth_cams("mccmask/cam", b, class_label.shape[1], h, w, 8, 3)
    flags = visible_flags(region_mask(cam, class_label, 0.25, 0.7), masks, 0.2)
    assert torch.equal(flags, case["flags"].float())
    present = present_classes(class_label)
    # Resized to its own size, so unchanged.
    assert torch.equal(method.visible_objects(present.select(cam), present, masks), flags)


def test_bicubic_resizing_matches_reference_values(golden):
    case = golden("vit_mcc_parts")
    cam = case.smooth_cams("mccmask/big", 1, case["bicubic"].shape[1], 112, 112, 16)
    resized = F.interpolate(cam, size=case["bicubic"].shape[2:], mode="bicubic", align_corners=False)
    assert_close(resized, case["bicubic"], **TIGHT)
    # The method resizes the same way: masks that show one token each read its region.
    method, one_class = demo_method(low_threshold=0.3, high_threshold=0.6), present_classes(torch.ones(1, 1))
    masks = ~torch.eye(49, dtype=torch.bool).view(1, 49, 7, 7)
    flags = method.visible_objects(cam[:, :1], one_class, masks)
    assert torch.equal(flags[0, 2:], (case["bicubic"][0, 0].flatten() > 0.3).float())


def test_contrast_matches_reference_value_and_gradient(golden):
    case = golden("vit_mcc_parts")
    rows = case["loss_grad"].shape[0]
    student = (0.2 * case.arr("mccloss/s", (rows, 64))).requires_grad_()
    teacher = 0.2 * case.arr("mccloss/t", (rows // 5, 64))
    loss = class_token_contrast(student, teacher, case["flags"], 0.5)
    assert_close(loss, case["loss"], **TIGHT)
    assert_close(torch.autograd.grad(loss, student)[0][:, ::2], case["loss_grad"], rtol=1e-4, atol=1e-7)


def test_masked_block_matches_reference_values(golden):
    case = golden("vit_mcc_parts")
    b, length = case["block/policy"].shape
    block = Block(64, 4, mlp_ratio=4.0, qkv_bias=True, norm_layer=LAYER_NORM)
    case.load_weights(block, "mccblk/")
    x = case.arr("mccblk/x", (b, length, 64)).requires_grad_()
    out = block(x, attn_mask=(case["block/policy"] == 0)[:, None, None])
    assert_close(out, case["block/out"], **TIGHT)
    (grad,) = torch.autograd.grad((out**2).mean(), x)
    expected = case["block/grad"]
    assert_close(grad[:, :, ::4], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("hidden", [0.0, 0.5, 0.9, 1.0])
def test_leaving_hidden_tokens_out_equals_masking_them(hidden):
    torch.manual_seed(0)
    backbone = create_backbone("vit_demo", width=32, depth=3, heads=2, image_size=48).double()
    image = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    masks = torch.rand(2, 4, 6, 5) < hidden
    tokens = masked_class_token(backbone, image, masks)  # view-major
    repeated = image.repeat(4, 1, 1, 1)
    expected = backbone(repeated, key_mask=masks.transpose(0, 1).flatten(0, 1)).cls_token
    assert_close(tokens, expected)
    weights = torch.randn_like(tokens)
    short, full = (
        torch.autograd.grad((x * weights).sum(), list(backbone.parameters())) for x in (tokens, expected)
    )
    assert_close(short, full)


@pytest.mark.parametrize("phase", ["p1", "p2"])
def test_training_step_matches_reference_values(golden, phase):
    case = golden("vit_step_mcc")
    b, h, w = case[f"{phase}/refined_label"].shape
    size = (b, 2 * h, 2 * w)
    views = {"image": "step/main", "global_view": "step/w", "strong_view": "step/s"}
    batch = {key: case.step_image(name, *size) for key, name in views.items()}
    batch |= {"class_label": case["y"].float(), "valid_box": case["box"].long()}
    step = int(case[f"{phase}/n_iter"])
    backbone = {"name": case.setting("backbone", "deit_small_patch16_224")}
    with torch.device("meta"):
        method = RecordedMCC(
            case["y"].shape[1] + 1,
            backbone,
            loss_weights=WEIGHTS | {"seg": [[0, 0.0], [2001, 0.1]]},
            mask_rate=case.setting("mask_rate", 0.7),
        )
    method.case = case
    state = {k: case.weight(author_name(k), v.shape) for k, v in method.state_dict().items()}
    method.load_state_dict(state, assign=True)
    student = []
    method.proj_head.register_forward_hook(lambda module, inputs, output: student.append(output))

    losses, _ = method(batch, step)
    total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
    total.backward()

    present = present_classes(batch["class_label"])
    for name, cam in zip(("cam", "cam_aux"), method.cams):
        # Recorded for every fifth class, computed for the present ones.
        for i, channels in enumerate(present.channels.tolist()):
            for j, channel in enumerate(channels):
                if present.label[i, j] and channel % 5 == 0:
                    recorded = case[f"{phase}/{name}_sub"][i, channel // 5]
                    assert_close(cam[i, j, ::12, ::12], recorded, rtol=1e-4, atol=1e-4)
    assert (method.label[:, ::2, ::2] != case[f"{phase}/refined_label"]).float().mean() <= 0.005
    assert (method.tokens != case[f"{phase}/ptc_label"]).float().mean() <= 0.005
    assert torch.equal(method.masks, case[f"{phase}/masks"].bool())
    assert torch.equal(method.flags, case[f"{phase}/flags"].float())

    for name, recorded in {
        "cls": "cls",
        "cls_aux": "cls_aux",
        "aff": "ptc",
        "seg": "seg",
        "mcc": "contrast",
    }.items():
        rtol = 1e-3 if name.startswith("cls") else 5e-3
        assert_close(losses[name], case[f"{phase}/loss_{recorded}"], rtol=rtol, atol=1e-6)
    assert_close(total, case[f"{phase}/total"], rtol=5e-3, atol=1e-6)
    assert_close(student[0][:, ::8], case[f"{phase}/out_s_sub"], rtol=1e-3, atol=1e-4)
    assert_close(method.teacher_out[:, ::8], case[f"{phase}/out_t_sub"], rtol=1e-3, atol=1e-4)
    bias = method.teacher_head.mlp[4].bias
    assert_close(stats(bias), case[f"{phase}/teacher_bias_stats"], **TIGHT)

    norms = [torch.stack([p.grad.norm() for p in g["params"]]).norm() for g in method.parameter_groups()]
    assert_close(torch.stack(norms).double(), case[f"{phase}/grad_norm_groups"], rtol=1e-2, atol=1e-6)
    for grad, recorded in (
        (method.classifier.weight.grad[::4, ::32, 0, 0], case[f"{phase}/grad_classifier"]),
        (method.backbone.blocks[5].attn.qkv.weight.grad[::64, ::64], case[f"{phase}/grad_qkv5_sub"]),
    ):
        assert_close(grad, recorded, rtol=5e-3, atol=1e-3 * recorded.abs().max().item())
    assert sum(p.grad is not None for p in method.parameters()) == int(case[f"{phase}/n_params_with_grad"])


def test_masks_belong_to_the_sample_and_leave_the_random_state_alone():
    method, batch = demo_method(num_masks=4), demo_batch()
    before = torch.get_rng_state()
    masks = method.sample_masks(batch, (6, 6))
    assert torch.equal(torch.get_rng_state(), before)
    alone = method.sample_masks({key: value[2:] for key, value in batch.items()}, (6, 6))
    assert torch.equal(alone, masks[2:])
    assert not torch.equal(masks[0], masks[1])
    cells = masks[:, :, ::2, ::2]
    assert torch.equal(cells.repeat_interleave(2, 2).repeat_interleave(2, 3), masks)


def test_masked_views_cost_what_is_visible():
    method, batch = demo_method(mask_rate=0.9), demo_batch()
    lengths = []
    method.backbone.blocks[0].register_forward_hook(lambda m, i, o: lengths.append(tuple(o.shape[:2])))
    method(batch, 0)
    masks = method.sample_masks(batch, (6, 6))
    assert lengths[-1] == (24, 1 + int((~masks).sum((2, 3)).max()))


@pytest.mark.parametrize("mask_rate", [0.0, 0.7, 1.0])
def test_any_mask_rate_and_images_without_object_train(mask_rate):
    method, batch = demo_method(mask_rate=mask_rate), demo_batch()
    batch["class_label"][1] = 0
    losses, _ = method(batch, 0)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_mixed_precision_gives_float32_losses():
    method, batch = demo_method(), demo_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = method(batch, 0)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_wrong_options_are_errors():
    with pytest.raises(ValueError, match="mask_scale=4 does not divide a grid of 6 x 6"):
        demo_method(mask_scale=4)(demo_batch(), 0)
    with pytest.raises(ValueError, match="mask_rate is a probability"):
        demo_method(mask_rate=95)
    with pytest.raises(ValueError, match="has no local crops: leave method.local_crop_size out"):
        demo_method(local_crop_size=32)
    with pytest.raises(ValueError, match="flag_source is 'cam' or 'aux_cam', not 'seg'"):
        demo_method(flag_source="seg")
