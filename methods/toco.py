"""ToCo: Token Contrast for Weakly-Supervised Semantic Segmentation (Ru et al., CVPR 2023).

B images, C foreground classes, P of them present, D width, (H, W) pixels, (h, w) tokens, s side of a local
crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from losses.affinity import patch_affinity_loss
from losses.classification import multilabel_loss
from losses.contrastive import class_token_contrast
from losses.segmentation import balanced_cross_entropy
from methods.base import Batch, Losses, Metrics, resize_like
from methods.vit_base import SingleStageViT, label_shares
from models.backbones.vit import ViT
from models.ema import momentum_copy, update_momentum_copy
from models.heads import LargeFOV, ProjectionHead
from ops.cam import PresentClasses, present_classes, region_mask
from ops.crops import crop_positions, cut
from utils.build import build_part, check_number
from utils.seed import sample_generator


class ToCo(SingleStageViT):
    """Contrast of patch tokens by labels from an inner block, of class tokens by uncertain regions.

    Args:
        loss_weights: of ``cls, cls_aux, ptc, ctc, seg, reg``.
        local_crop_size: side of the local crops in pixels.
        num_local_crops: local crops per image.
        object_share: a local crop is a negative view when the mean of its region mask (0 background, 1
            uncertain, 2 foreground) is not above this.
        temperature: of the class token contrast.
        momentum: of the teacher's projection head. The encoder has no teacher.
        head: widths of the projection head.
        start: the first weights of the layers that are not pretrained: ``own``, or ``published``, those that
            the authors' program draws from the same seed. Short runs on few images depend on them
            (docs/results.md).
        **options: of ``SingleStageViT``.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        local_crop_size: int = 96,
        num_local_crops: int = 8,
        object_share: float = 0.2,
        temperature: float = 0.5,
        momentum: float = 0.9,
        head: Mapping[str, int] | None = None,
        start: Literal["own", "published"] = "own",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, backbone, loss_weights=loss_weights, **options)
        if start not in ("own", "published"):
            raise ValueError(f"method.start is own or published, not {start!r}")
        check_number("method.num_local_crops", num_local_crops, 1, math.inf)
        check_number("method.object_share", object_share, 0, 2)
        check_number("method.momentum", momentum)
        self.local_crop_size = local_crop_size
        self.num_local_crops = num_local_crops
        self.object_share = object_share
        self.temperature = temperature
        self.momentum = momentum
        make_head = partial(build_part, ProjectionHead, head, self.backbone.embed_dim, key="method.head")
        self.proj_head = make_head()
        if start == "published":
            self.draw_published_start(make_head)
        self.teacher_head = momentum_copy(self.proj_head)
        self.teacher_step = -1

    @classmethod
    def parts(cls, options: Mapping[str, Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
        yield from super().parts(options)
        yield "head", ProjectionHead

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        image, class_label, valid_box = batch["image"], batch["class_label"], batch["valid_box"]
        present = present_classes(class_label)

        # The main image is the first global view, so one pass over both views serves classifiers, decoder,
        # CAM, student and teacher. The authors' program encodes these images three times, with equal results.
        views = self.backbone(torch.cat([image, batch["global_view"]]))
        out = self.read_out(views.images(0, len(image)))
        cam, aux_cam = self.training_cams(image, out.tokens, present)  # (B, P, H, W) in [0, 1], no gradient
        source = {"cam": cam, "aux_cam": aux_cam}[self.label_source(step)]
        pseudo_label = self.pseudo_label(image, source, present, valid_box)  # (B, H, W)
        size = out.tokens.patch_tokens.shape[-2:]
        affinity = self.affinity_label(aux_cam, present, valid_box, size)  # (B, hw, hw)

        crops, is_positive = self.sample_crops(batch, aux_cam, present)  # (8B, 3, s, s), (B, 10)
        student = self.proj_head(torch.cat([views.cls_token, self.backbone(crops).cls_token]))
        teacher = self.teach(views.cls_token, step)
        seg_logits = resize_like(out.seg_logits, pseudo_label)

        return {
            "cls": multilabel_loss(out.class_logits, class_label),
            "cls_aux": multilabel_loss(out.aux_class_logits, class_label),
            "ptc": patch_affinity_loss(out.tokens.patch_tokens, affinity),
            "ctc": class_token_contrast(student, teacher, is_positive, self.temperature),
            "seg": balanced_cross_entropy(seg_logits, pseudo_label),
            "reg": self.dense_energy(image, seg_logits, pseudo_label, valid_box, step),
        }, label_shares(pseudo_label)

    def draw_published_start(self, make_head: Callable[[], ProjectionHead]) -> None:
        """Draw the new layers as the authors' program does.

        It seeds one generator and builds encoder, both projection heads, decoder and classifiers, in the
        order of the names in its checkpoints.
        """
        if not isinstance(self.decoder, LargeFOV):
            raise ValueError("method.start=published is of the published decoder: method.decoder=large_fov")
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the accelerators too.
            torch.default_generator.manual_seed(torch.initial_seed())
            left = draws_of_encoder(self.backbone)
            while left:  # in parts, for a ViT-L draws half a billion
                left -= torch.rand(min(left, 1 << 24)).numel()
            self.proj_head, _ = make_head(), make_head()  # the teacher's is drawn, then overwritten
            convolutions = self.decoder.conv6, self.decoder.conv7, self.decoder.conv8
            for layer in (*convolutions, self.classifier, self.aux_classifier):
                layer.reset_parameters()

    @torch.no_grad()
    def teach(self, cls_token: Tensor, step: int) -> Tensor:
        """The teacher's projection of class tokens (2B, D): the momentum head on the student's encoder."""
        # Once per step, however many micro-batches a step is accumulated from.
        if step != self.teacher_step:
            update_momentum_copy(self.teacher_head, self.proj_head, self.momentum)
            self.teacher_step = step
        return self.teacher_head(cls_token)

    def sample_crops(self, batch: Batch, aux_cam: Tensor, present: PresentClasses) -> tuple[Tensor, Tensor]:
        """Local crops (V' * B, 3, s, s) view-major, and which of the views show an object, (B, 2 + V')."""
        region = region_mask(aux_cam, present.label, self.low_threshold, self.high_threshold)
        # The paper speaks of uncertain regions; the authors' program centres crops on confident background
        # too, and in black padding as well.
        candidates, size = region <= 1, self.local_crop_size
        positions = crop_positions(
            candidates, size, self.num_local_crops, lambda i, n: self.permutation(batch, i, n)
        )
        crops = cut(batch["strong_view"], positions, size)
        is_positive = object_flags(cut(region[:, None], positions, size), self.object_share)
        return crops.flatten(0, 1), is_positive

    def permutation(self, batch: Batch, i: int, n: int) -> Tensor:
        """The random order of the ``n`` crop candidates of image ``i``; it belongs to the sample."""
        return torch.randperm(n, generator=sample_generator(int(batch["sample_seed"][i]), "crops"))


def draws_of_encoder(backbone: ViT) -> int:
    """How many numbers the authors' encoder draws before its pretrained weights replace them: every layer as
    PyTorch makes it, the matrices once more, and the 1000-way head that nobody uses.
    """
    linear = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
    linear.append(nn.Linear(backbone.embed_dim, 1000, device="meta"))
    matrices = sum(layer.weight.numel() for layer in linear)
    biases = sum(layer.bias.numel() for layer in linear if layer.bias is not None)
    rest = (*backbone.patch_embed.parameters(), backbone.pos_embed, backbone.cls_token)
    return 2 * matrices + biases + sum(parameter.numel() for parameter in rest)


def object_flags(regions: Tensor, object_share: float) -> Tensor:
    """Which views show an object, (B, 2 + V) float, from the crops (V, B, 1, s, s) of the region mask.

    The two global views always do. Certain foreground counts twice, as in the authors' program.
    """
    share = (regions.flatten(2).float().sum(2) / regions[0, 0].numel()).T  # (B, V)
    return torch.cat([share.new_ones(len(share), 2), (share > object_share).float()], 1)
