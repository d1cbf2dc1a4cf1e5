"""SeCo: Separate and Conquer: Decoupling Co-occurrence via Decomposition and Representation for Weakly
Supervised Semantic Segmentation (Yang et al., CVPR 2024).

B images, V local crops of each, s their side, C foreground classes, P of them present, D width, (H, W)
pixels. Tags: 1..C a class, 0 background, -1 mixed or unknown.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.affinity import patch_affinity_loss
from losses.classification import multilabel_loss
from losses.segmentation import balanced_cross_entropy
from losses.tag_contrast import MIXED, local_to_global_contrast, local_to_local_contrast
from methods.base import Batch, Losses, Metrics, resize_like
from methods.contrastive_vit import ContrastiveViT
from methods.vit_base import cam_schedule, label_shares
from models.backbones import whole_crop
from models.heads import ProjectionHead
from models.memory import enqueue_, momentum_copy, moved_prototypes
from ops.cam import PresentClasses
from ops.crops import crop_positions, cut, random_order
from ops.labels import cam_to_confident_label, ignore_outside_box
from utils.build import check_number
from utils.distributed import gather_batch
from utils.image import IGNORE_INDEX, MAX_CLASS
from utils.precision import full_precision
from utils.seed import sample_generator


def key_head(width: int, hidden_dim: int = 2048) -> ProjectionHead:
    """(N, width) -> (N, width) of unit length: prototypes average class tokens and are compared with keys."""
    return ProjectionHead(width, hidden_dim, bottleneck_dim=width, out_dim=None)


class SeCo(ContrastiveViT):
    """Images are decomposed into local crops with category tags; class tokens are contrasted by tag.

    Two teachers: a momentum encoder with its head fills the queue of tagged keys (LIL), and class prototypes
    hold what images of a single class look like (LIG).

    Args:
        loss_weights: of ``cls, cls_aux, ptc, lil, lig, seg, reg``.
        local_crop_size: side of the local crops in pixels.
        num_local_crops: local crops per image.
        tag_source: which CAM tags are read from, ``cam`` or ``aux_cam``, or a schedule of them.
        tag_threshold: a crop is background when not more than this share of it is uncertain or object.
        revise_ratio: see ``local_to_local_contrast``.
        prototype_from_step: first step that updates the prototypes.
        prototype_momentum: their moving average's factor. They follow faster, for class tokens are longer.
        queue_size: number of keys that are remembered, over all processes.
        temperature_lil, temperature_lig: of the contrast with the queue, and with the prototypes.
        **options: of ``ContrastiveViT``. ``follow: paper`` changes tags and crops too, see ``decompose``.
    """

    crf_preset = "seco"
    make_head = key_head
    training_only = (*ContrastiveViT.training_only, "prototypes", "queue")
    losses = ("cls", "cls_aux", "ptc", "lil", "lig", "seg", "reg")

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        loss_weights: Mapping[str, Any] | None = None,
        decoder: str = "aspp",
        cam_scales: Sequence[float] = (1.0, 0.5, 0.75, 1.5),
        main_view: Literal["augmented", "plain"] = "plain",
        momentum: float = 0.999,
        local_crop_size: int = 64,
        num_local_crops: int = 10,
        tag_source: Any = ((0, "aux_cam"), (10000, "cam")),
        tag_threshold: float = 0.2,
        revise_ratio: float = 10.0,
        prototype_from_step: int = 600,
        prototype_momentum: float = 0.9,
        queue_size: int = 4608,
        temperature_lil: float = 0.08,
        temperature_lig: float = 0.1,
        **options: Any,
    ) -> None:
        options |= {"loss_weights": loss_weights, "cam_scales": cam_scales}
        super().__init__(num_classes, backbone, decoder, main_view=main_view, momentum=momentum, **options)
        check_number("method.num_local_crops", num_local_crops, 1, math.inf)
        check_number("method.prototype_momentum", prototype_momentum)
        self.local_crop_size = whole_crop(self, local_crop_size, "method.local_crop_size")
        self.num_local_crops = num_local_crops
        self.tag_source = cam_schedule("tag_source", tag_source)
        self.tag_threshold, self.revise_ratio = tag_threshold, revise_ratio
        self.prototype_from_step, self.prototype_momentum = prototype_from_step, prototype_momentum
        self.temperature_lil, self.temperature_lig = temperature_lil, temperature_lig

        self.teacher_backbone = momentum_copy(self.backbone)
        width = self.backbone.embed_dim
        self.register_buffer("prototypes", torch.randn(num_classes - 1, width))
        # Noise until real keys have replaced it (96 steps of 48): on VOC and COCO long before LIL has weight.
        # As published, prototypes start unnormalised, and of the queue not the rows but the columns are unit.
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, width), dim=0))
        self.register_buffer("queue_tags", torch.zeros(queue_size, 1, dtype=torch.int64))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def training_step(self, batch: Batch, step: int) -> tuple[Losses, Metrics]:
        image, class_label, valid_box = batch["image"], batch["class_label"], batch["valid_box"]
        image_rgb, views, out, present, cams, pseudo_label, affinity = self.begin(batch, step)

        # Separate: crops of one category each, as far as the CAM can tell.
        positions, tags = self.decompose(batch, cams[self.tag_source(step)], present)  # (B, V, 2), (B, 2 + V)
        tags = tags.flatten()  # ((2 + V) * B,), image-major like everything below
        parts = cut(torch.cat([image, batch["strong_view"]], 1), positions, self.local_crop_size)
        crops, key_crops = (part.flatten(0, 1) for part in parts.chunk(2, 2))

        # Conquer: class tokens against remembered tokens and against prototypes.
        if step >= self.prototype_from_step:
            self.update_prototypes(out.tokens.cls_token, class_label)
        query = project(self.proj_head, views.cls_token, self.backbone(crops).cls_token)  # ((2 + V) * B, D)
        # The queue keeps the tags as they are, LIG gets the revised ones.
        new = self.remember(self.teach(views.cls_token, key_crops, step), tags)
        lil, revised_tags = local_to_local_contrast(
            query, self.queue, tags, self.queue_tags[:, 0], self.temperature_lil, new, self.revise_ratio
        )
        lig = local_to_global_contrast(query, self.prototypes, revised_tags, self.temperature_lig)
        cls, cls_aux = multilabel_loss(torch.stack([out.class_logits, out.aux_class_logits]), class_label)
        seg_logits = resize_like(out.seg_logits, pseudo_label)

        return {
            "cls": cls,
            "cls_aux": cls_aux,
            "ptc": patch_affinity_loss(out.tokens.patch_tokens, affinity),
            "lil": lil,
            "lig": lig,
            "seg": balanced_cross_entropy(seg_logits, pseudo_label),
            "reg": self.dense_energy(image_rgb, seg_logits, pseudo_label, valid_box, step),
        }, label_shares(pseudo_label)

    # -- separate

    @torch.no_grad()
    def decompose(self, batch: Batch, cam: Tensor, present: PresentClasses) -> tuple[Tensor, Tensor]:
        """Corners (B, V, 2) of the local crops, and tags (B, 2 + V) of the two global views and the crops.

        The program centres crops on uncertain pixels, so that crops of few tokens are never background. The
        paper's crops are anywhere in the image.

        Args:
            batch: ``valid_box`` and ``sample_seed`` are read.
            cam: (B, P, H, W) in [0, 1].
        """
        thresholds = self.low_threshold, self.high_threshold
        label = cam_to_confident_label(cam, present.label, *thresholds, present.class_ids, uncertain=MIXED)
        label = ignore_outside_box(label, batch["valid_box"])
        centres = label == MIXED if self.follow == "program" else label != IGNORE_INDEX
        size = self.local_crop_size
        positions = crop_positions(centres, size, self.num_local_crops, partial(self.crop_order, batch))
        return positions, category_tags(label, positions, size, self.tag_threshold, self.follow)

    def crop_order(self, batch: Batch, n: Tensor) -> Tensor:
        """Which of the n (B,) candidates for crops are taken (B, V)."""
        if self.follow == "paper":
            generators = [sample_generator(int(seed), "crops") for seed in batch["sample_seed"]]
        else:  # the authors seed torch's global generator here, for every image of every step
            generators = [torch.Generator().manual_seed(0) for _ in range(len(n))]
        return random_order(n, self.num_local_crops, generators)

    # -- conquer

    @torch.no_grad()
    def teach(self, global_tokens: Tensor, key_crops: Tensor, step: int) -> Tensor:
        """Unit keys ((2 + V) * B, D); those of the global views from the student's tokens, as published."""
        teachers = [self.teacher_backbone, self.teacher_head]
        self.move_teachers(step, teachers, [self.backbone, self.proj_head])
        local_tokens = self.teacher_backbone(key_crops).cls_token
        return project(self.teacher_head, global_tokens, local_tokens)

    @torch.no_grad()
    def remember(self, keys: Tensor, tags: Tensor) -> Tensor:
        """Put keys (R, D) and tags (R,) of all processes, in the order of the batch, into the queue.

        Returns their places in it. They count twice: the authors contrast with them and with a queue that
        holds them. They prepend the process's own keys alone; here the loss does not depend on the number of
        processes.
        """
        return enqueue_(self.queue, self.queue_tags, self.queue_ptr, gather_batch(keys), gather_batch(tags))

    @torch.no_grad()
    def update_prototypes(self, cls_token: Tensor, class_label: Tensor) -> None:
        """Move prototypes towards the class tokens (B, D) of images with a single class."""
        is_class = class_label * (class_label.sum(1, keepdim=True) == 1)
        with full_precision(cls_token):
            tokens, is_class = gather_batch(cls_token.float()), gather_batch(is_class.float())
            self.prototypes = moved_prototypes(self.prototypes, tokens, is_class, self.prototype_momentum)


def category_tags(
    label: Tensor, positions: Tensor, size: int, threshold: float = 0.2, follow: str = "program"
) -> Tensor:
    """What the global views and the local crops of each image show, (B, 2 + V), by a confident label of it.

    An image, or a crop, with one class is tagged by it, with several it is mixed. Uncertain pixels of an
    image with a single class are taken to show that class.

    Args:
        label: (B, H, W) int64: 1..C a class, 0 background, -1 uncertain, 255 outside of the image.
        positions: (B, V, 2) top-left corners of the crops.
        size: s.
        threshold: a crop is background when its mass is not above this share.
        follow: in the program an object pixel weighs its class number in that share, and the global views of
            an image without a confident class are tagged 1. By the paper every pixel counts once, and such
            views are mixed.
    """
    label = label.masked_fill(label == IGNORE_INDEX, 0)
    parts = cut(label[:, None], positions, size).flatten(2)  # (V, B, s*s)
    weight = parts.abs() if follow == "program" else parts != 0
    whole = single_class(label.flatten(1))  # (B,)
    tags = single_class(torch.where(parts == MIXED, whole[:, None], parts))
    tags = tags.masked_fill(weight.mean(-1, dtype=torch.float32) <= threshold, 0)  # (V, B)
    if follow == "program":
        whole = whole.masked_fill((label <= 0).flatten(1).all(1), 1)
    return torch.cat([whole[:, None].expand(-1, 2), tags.T], 1)


def single_class(classes: Tensor) -> Tensor:
    """The only class number > 0 along the last dimension; -1 where there is none, and for several."""
    highest = classes.amax(-1)
    lowest = classes.masked_fill(classes <= 0, MAX_CLASS).amin(-1)
    return highest.masked_fill(lowest != highest, MIXED)


def project(head: ProjectionHead, global_tokens: Tensor, local_tokens: Tensor) -> Tensor:
    """Unit vectors ((2 + V) * B, D) of view-major tokens (2B, D) and (V * B, D), those of an image together.

    In float32: divided by their small temperature, half-precision products of them would be off by 0.05.
    """
    batch = len(global_tokens) // 2
    parts = [tokens.unflatten(0, (-1, batch)).transpose(0, 1) for tokens in (global_tokens, local_tokens)]
    tokens = torch.cat(parts, 1).flatten(0, 1)
    with full_precision(tokens):
        return head(tokens.float())
