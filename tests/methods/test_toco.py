"""ToCo's training step: the authors' values, and that sharing forward passes costs nothing but time."""

import pytest
import torch
from torch.testing import assert_close

from engine.segmentation import segment_views
from losses.classification import multilabel_loss
from losses.contrastive import class_token_contrast
from methods.toco import ToCo
from methods.vit_base import SingleStageViT
from ops.cam import multi_scale_cam, present_classes

DEMO = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48}


def demo_batch(b=3, size=48, classes=5):
    generator = torch.Generator().manual_seed(0)
    views = {
        k: torch.randn(b, 3, size, size, generator=generator) for k in ("image", "global_view", "strong_view")
    }
    class_label = torch.zeros(b, classes)
    class_label[range(b), range(b)] = 1
    class_label[0, 2] = 1
    box = torch.tensor([[0, size, 0, size]]).repeat(b, 1)
    return views | {"class_label": class_label, "valid_box": box, "sample_seed": torch.arange(b)}


def demo_method(**options):
    torch.manual_seed(0)
    options = {"loss_weights": {"cls": 1, "cls_aux": 1, "ptc": 0.2, "ctc": 0.5, "seg": 0.1}} | options
    return ToCo(6, DEMO, local_crop_size=24, num_local_crops=3, head={"hidden_dim": 32}, **options)


def test_shared_forward_equals_separate_forwards():
    """Main image, first global view, teacher and CAM share a pass; numbers are as without sharing."""
    method, batch = demo_method(), demo_batch()
    double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    method.double()
    losses, _ = method(double, 0)
    image, present = double["image"], present_classes(double["class_label"])
    everything = multi_scale_cam(method.activation_of, image, method.cam_scales)
    shared = method.training_cams(image, method.network(image).tokens, present)
    for cam, all_classes in zip(shared, everything):
        assert_close(cam, present.select(all_classes))
    out = method.network(image)
    prediction = method.predict(image, method.cam_scales)
    assert_close(prediction.class_logits, out.class_logits)
    for cam, all_classes in zip((prediction.cam, prediction.aux_cam), everything):
        assert_close(cam, all_classes)

    tokens = [method.network(double[view]).tokens.cls_token for view in ("image", "global_view")]
    crops, flags = method.sample_crops(double, shared[1], present)
    local = torch.cat([method.backbone(part).cls_token for part in crops.split(3)])
    student = method.proj_head(torch.cat([*tokens, local]))
    teacher = method.teacher_head(
        torch.cat([method.backbone(double[v]).cls_token for v in ("image", "global_view")])
    )
    assert_close(losses["ctc"], class_token_contrast(student, teacher, flags, method.temperature))
    assert_close(losses["cls"], multilabel_loss(out.class_logits, double["class_label"]))


def test_no_image_is_encoded_twice_and_cam_passes_run_no_decoder():
    method, batch = demo_method(), demo_batch()
    images, decoded = [], []
    method.backbone.register_forward_hook(lambda m, i, o: images.append(tuple(i[0].shape[::2])))
    method.decoder.register_forward_hook(lambda m, i, o: decoded.append(len(i[0])))
    method(batch, 0)
    assert decoded == [3]
    # main + second view; mirrored image; two scales of image and mirrored image; nine local crops.
    assert images == [(6, 48), (3, 48), (6, 24), (6, 72), (9, 24)]


def test_draws_belong_to_the_sample():
    method, batch = demo_method(), demo_batch()
    present = present_classes(batch["class_label"])
    aux_cam = torch.rand(3, 2, 48, 48, generator=torch.Generator().manual_seed(1))
    crops, flags = method.sample_crops(batch, aux_cam, present)
    again, _ = method.sample_crops(batch, aux_cam, present)
    assert_close(crops, again, rtol=0, atol=0)
    last = {k: v[2:] for k, v in batch.items()}
    alone, alone_flags = method.sample_crops(last, aux_cam[2:, :1], present_classes(last["class_label"]))
    assert_close(alone, crops.view(3, 3, 3, 24, 24)[:, 2], rtol=0, atol=0)
    assert_close(alone_flags, flags[2:])
    other, _ = method.sample_crops(batch | {"sample_seed": torch.arange(3) + 7}, aux_cam, present)
    assert not torch.equal(other, crops)


def test_teacher_moves_once_per_step():
    method, batch = demo_method(), demo_batch()
    with torch.no_grad():
        for parameter in method.proj_head.parameters():
            parameter.add_(1.0)
    before = method.teacher_head.mlp[0].bias.clone()
    method(batch, 0)
    method(batch, 0)
    assert_close(method.teacher_head.mlp[0].bias, before + 0.1)
    method(batch, 1)
    assert_close(method.teacher_head.mlp[0].bias, before + 0.19)


def test_images_without_object_and_with_empty_box_train():
    method, batch = demo_method(follow="paper"), demo_batch()
    batch["class_label"][:] = 0
    batch["valid_box"][0] = torch.tensor([10, 10, 0, 48])
    losses, _ = method(batch, 0)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_box_of_the_affinity_loss_can_be_scaled():
    batch = demo_batch()
    batch["valid_box"][:] = torch.tensor([16, 48, 0, 48])
    cam, present = torch.zeros(3, 2, 48, 48), present_classes(batch["class_label"])
    program, paper = (
        demo_method(follow=how).token_label(cam, present, batch["valid_box"], (6, 6))
        for how in ("program", "paper")
    )
    assert (program == 255).all()  # row 16 and below of a map of 6 rows
    assert (paper[:, :2] == 255).all() and (paper[:, 2:] == 0).all()


def test_energy_term_appears_with_its_weight():
    weights = {"cls": 1, "cls_aux": 1, "ptc": 0.2, "ctc": 0.5, "seg": 0.1, "reg": [[0, 0.0], [3, 0.05]]}
    method, batch = demo_method(loss_weights=weights), demo_batch()
    assert method(batch, 2)[0]["reg"] == 0
    losses, _ = method(batch, 3)
    losses["reg"].backward()
    assert losses["reg"] < 0 and method.decoder.conv8.weight.grad.abs().sum() > 0


def test_mixed_precision_keeps_labels_and_losses_in_float32():
    method, batch = demo_method(), demo_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = method(batch, 0)
        cam, _ = method.training_cams(
            batch["image"], method.network(batch["image"]).tokens, present_classes(batch["class_label"])
        )
    assert cam.dtype == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_a_batch_can_be_overfitted():
    method, batch = demo_method(), demo_batch()
    optimizer = torch.optim.AdamW(method.parameters(), 1e-3)
    for step in range(15):
        losses, _ = method(batch, step)
        total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step == 0:
            first = losses["cls"].item() + losses["cls_aux"].item()
    assert losses["cls"].item() + losses["cls_aux"].item() < 0.6 * first


def test_wrong_options_are_errors():
    for options, message in (
        ({"label_source": "seg"}, "label_source"),
        ({"decoder": "unet"}, "no decoder 'unet'"),
        ({"num_classes": 1}, "counts the background"),
    ):
        with pytest.raises(ValueError, match=message):
            SingleStageViT(**({"num_classes": 6, "backbone": DEMO} | options))
    for options, message in (({"follow": "half"}, "follow"), ({"decoder": None}, "decoder")):
        with pytest.raises(ValueError, match=message):
            demo_method(**options)
    with pytest.raises(ValueError, match="no decoder"):
        segment_views(SingleStageViT(6, DEMO, decoder=None), torch.zeros(1, 3, 48, 48))
