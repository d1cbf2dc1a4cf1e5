"""What ToCo, SeCo and MCC share in training; each adds its own contrast of class tokens.

B images, P present classes, D width, (H, W) pixels, (h, w) tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.transforms import WeakStrongViews
from losses.dense_energy import dense_energy_loss
from methods.base import Batch, Transform
from methods.vit_base import Output, SingleStageViT
from models.backbones.vit import Tokens
from models.heads import ProjectionHead
from models.memory import momentum_copy, update_momentum_copy
from ops.cam import PresentClasses, present_classes
from ops.crops import check_room
from ops.labels import affinity_label, box_on_tokens, cam_to_confident_label, ignore_outside_box
from utils.build import build_part, check_choice, check_number
from utils.image import denormalize


class Start(NamedTuple):
    """What a step knows of its batch before the contrast; only ``views`` and ``out`` carry gradient."""

    image_rgb: Tensor  # (B, 3, H, W) of the main images, 0..255, neither rounded nor clipped
    views: Tokens  # of the main images and, behind them, of the second views: cls_token (2B, D)
    out: Output  # of the main images
    present: PresentClasses
    cams: dict[str, Tensor]  # cam and aux_cam, (B, P, H, W) in [0, 1]
    pseudo_label: Tensor  # (B, H, W)
    affinity: Tensor  # (B, hw, hw)


class ContrastiveViT(SingleStageViT):
    """A single-stage ViT that contrasts class tokens with those of a momentum copy.

    Args:
        decoder: of ``SingleStageViT``, not None.
        follow: ``program``, what the authors' code does, or ``paper``, what the text says (docs/methods.md).
        main_view: what classifier and decoder see, the ``augmented`` view (ToCo, MCC) or the ``plain`` crop.
        momentum: of the teacher. ToCo and MCC have one of the projection head alone.
        head: arguments of the projection head, such as ``hidden_dim``.
        **options: of ``SingleStageViT``.
    """

    make_head: Callable[..., ProjectionHead] = ProjectionHead
    training_only = ("proj_head.", "teacher_")
    local_crop_size, num_local_crops = 0, 0  # of a method without local crops

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        decoder: str = "large_fov",
        follow: Literal["program", "paper"] = "program",
        main_view: Literal["augmented", "plain"] = "augmented",
        momentum: float = 0.9,
        head: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, backbone, decoder, **options)
        if self.decoder is None:
            raise ValueError(f"{type(self).__name__} trains a decoder: method.decoder cannot be null")
        check_choice("method.follow", follow, ("program", "paper"))
        check_number("method.momentum", momentum)
        self.follow, self.main_view, self.momentum = follow, main_view, momentum
        self.teacher_step = -1  # the last one that moved the teachers
        self.proj_head = build_part(type(self).make_head, head, self.backbone.embed_dim, key="method.head")
        self.teacher_head = momentum_copy(self.proj_head)

    def begin(self, batch: Batch, step: int) -> Start:
        """Tokens, CAMs and labels of a batch."""
        image, valid_box = batch["image"], batch["valid_box"]
        present = present_classes(batch["class_label"], batch.get("most_classes"))
        # The main image is the first global view as well: one pass serves classifiers, decoder, CAM and
        # contrast. The authors' programs encode it three times, with equal results.
        views = self.backbone(torch.cat([image, batch["global_view"]]))
        out = self.read_out(views.images(0, len(image)))
        cam, aux_cam = self.multi_scale(image, self.cam_scales, out.tokens, present.select)
        cams = {"cam": cam, "aux_cam": aux_cam}
        image_rgb = denormalize(image)
        pseudo_label = self.pseudo_label(image_rgb, cams[self.label_source(step)], present, valid_box)
        size = out.tokens.patch_tokens.shape[-2:]
        affinity = affinity_label(self.token_label(aux_cam, present, valid_box, size))
        return Start(image_rgb, views, out, present, cams, pseudo_label, affinity)

    @torch.no_grad()
    def token_label(
        self, cam: Tensor, present: PresentClasses, valid_box: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Confident labels (B, h, w) of tokens: background, a present class, or ignored."""
        cam = F.interpolate(cam, size=tuple(size), mode="bilinear", align_corners=False)
        label = cam_to_confident_label(
            cam, present.label, self.low_threshold, self.high_threshold, class_ids=present.class_ids
        )
        if self.follow == "paper":
            valid_box = box_on_tokens(valid_box, self.backbone.patch_size)
        return ignore_outside_box(label, valid_box)

    @torch.no_grad()
    def teach(self, cls_token: Tensor, step: int) -> Tensor:
        """The teacher's projection of class tokens (N, D): the momentum head on the student's encoder."""
        self.move_teachers(step, [self.teacher_head], [self.proj_head])
        return self.teacher_head(cls_token)

    def move_teachers(self, step: int, teachers: Sequence[nn.Module], students: Sequence[nn.Module]) -> None:
        """Move teachers towards students once per step, however many micro-batches it is accumulated from."""
        if step != self.teacher_step:
            update_momentum_copy(teachers, students, self.momentum)
        self.teacher_step = step

    def dense_energy(
        self, image_rgb: Tensor, seg_logits: Tensor, pseudo_label: Tensor, valid_box: Tensor, step: int
    ) -> Tensor:
        """The loss ``reg``; 0, and no work, while its weight is 0."""
        if not self.loss_weight("reg", step):
            return seg_logits.new_zeros(())
        return dense_energy_loss(image_rgb, seg_logits, pseudo_label, valid_box)

    def train_transform(self, crop_size: int, scale_range: tuple[float, float]) -> Transform:
        check_room(crop_size, crop_size, self.local_crop_size, self.num_local_crops)
        return WeakStrongViews(
            crop_size, scale_range, main_view=self.main_view, consistent_flip=self.follow == "paper"
        )
