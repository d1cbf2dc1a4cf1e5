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
from tests.methods.demo import VIT, demo_batch, demo_method


def test_shared_forward_equals_separate_forwards():
    """Main image, first global view, teacher and CAM share a pass; numbers are as without sharing."""
    method, batch = demo_method(ToCo), demo_batch()
    double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    method.double()
    losses, _ = method(double, 0)
    image, present = double["image"], present_classes(double["class_label"])
    everything = multi_scale_cam(method.activation_of, image, method.cam_scales)
    shared = method.multi_scale(image, method.cam_scales, method.network(image).tokens, present.select)
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


def test_draws_belong_to_the_sample():
    method, batch = demo_method(ToCo), demo_batch()
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


def test_box_of_the_affinity_loss_can_be_scaled():
    batch = demo_batch()
    batch["valid_box"][:] = torch.tensor([16, 48, 0, 48])
    cam, present = torch.zeros(3, 2, 48, 48), present_classes(batch["class_label"])
    program, paper = (
        demo_method(ToCo, follow=how).token_label(cam, present, batch["valid_box"], (6, 6))
        for how in ("program", "paper")
    )
    assert (program == 255).all()  # row 16 and below of a map of 6 rows
    assert (paper[:, :2] == 255).all() and (paper[:, 2:] == 0).all()


def test_a_network_without_decoder_segments_nothing():
    with pytest.raises(ValueError, match="no decoder"):
        segment_views(SingleStageViT(6, VIT, decoder=None), torch.zeros(1, 3, 48, 48))
