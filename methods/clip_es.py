"""CLIP-ES: class activation maps of CLIP, without any training.

"CLIP is Also an Efficient Segmenter: A Text-Driven Approach for Weakly Supervised Semantic Segmentation" (Lin
et al., CVPR 2023). B images, C foreground classes, P of them present, L blocks, (h, w) patches, N = h * w,
D width of the image tower, E width of the space of texts and images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.lists import with_hole
from methods.base import Method, Prediction
from models.backbones import create_backbone
from models.backbones.clip import OpenClip, attend
from models.refiners.attention_affinity import spread, transition
from ops.cam import normalize_cam
from utils.image import resize
from utils.precision import full_precision


class Encoded(NamedTuple):
    """What the network makes of images; the last two are of WeCLIP's decoder."""

    sequences: list[Tensor]  # (B, 1 + N, D) behind every block
    attention: Tensor  # (L, B, N, N) between the patches, in full precision
    size: tuple[int, int]  # (h, w)
    class_logits: Tensor  # (B, C), how much better the text of a class fits than the best of the background
    affinity: Tensor | None = None  # (B, N, N) in (0, 1)
    seg_logits: Tensor | None = None  # (B, K, h, w)


class ClipES(Method):
    """CLIP with the texts of classes and of a background; predicts places and trains nothing.

    Args:
        num_classes: with background.
        backbone: arguments of ``create_backbone`` for ``open_clip``: ``model``, ``weights``.
        words: a text for each foreground class, or a list of texts, whose vectors are averaged.
        background_words: texts of what surrounds objects.
        prompt: what the texts are put into.
        layers: last blocks whose attention is averaged; 0: all.
        box_threshold: of the boxes that a map counts in, a share of its maximum.
        cam_scales: image scales that CAMs are summed over; each image and its mirror image.
    """

    needs_background = True

    crf_preset = "clip_es"

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        words: Sequence[str | Sequence[str]],
        background_words: Sequence[str],
        prompt: str = "a clean origami {}.",
        layers: int = 8,
        box_threshold: float = 0.4,
        loss_weights: Mapping[str, Any] | None = None,
        background_threshold: float = 0.5,
        cam_scales: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(num_classes, loss_weights, background_threshold, cam_scales)
        _, *words = with_hole(["background", *words])
        if len(words) != num_classes - 1:
            raise ValueError(f"method.words names {len(words)} classes, the data set has {num_classes - 1}")
        if not background_words:
            raise ValueError("method.background_words is empty: a softmax over one class says nothing")
        self.layers, self.box_threshold = layers, box_threshold
        self.backbone = create_backbone(**backbone)
        if not isinstance(self.backbone, OpenClip):
            raise ValueError(f"{type(self).__name__} needs the text tower of the backbone open_clip")
        self.backbone.requires_grad_(False)
        texts = [[text] if isinstance(text, str) else list(text) for text in [*words, *background_words]]
        vectors = [self.backbone.encode_texts([prompt.format(t) for t in group]).mean(0) for group in texts]
        self.register_buffer("text_vectors", F.normalize(torch.stack(vectors), dim=-1))  # (C + b, E)
        self.backbone.texts = None  # 250 MB that nothing needs any more

    def predict(self, image: Tensor, scales: Sequence[float]) -> Prediction:
        """As with tags, of the classes that are more likely than all background words."""
        return self.predict_tagged(image, None, scales)

    @torch.no_grad()
    def predict_tagged(
        self, image: Tensor, class_label: Tensor | None, scales: Sequence[float]
    ) -> Prediction:
        """CAMs (B, C, H, W) of the tagged classes over scales and mirror images, 0 for all others."""
        out = self.encode(image)
        if not scales:
            return Prediction(None, None, out.class_logits, out.seg_logits)
        class_label = (out.class_logits > 0).float() if class_label is None else class_label
        total = image.new_zeros(len(image), self.num_classes - 1, *image.shape[-2:])
        for scale in (1.0, *(s for s in scales if s != 1.0)):
            scaled = self.whole(image, scale)
            for flip in (False, True):
                cam = self.cams(self.encode(scaled.flip(-1) if flip else scaled), class_label)
                total += resize(cam.flip(-1) if flip else cam, image.shape[-2:])
        return Prediction(normalize_cam(total), None, out.class_logits, out.seg_logits)

    def encode(self, image: Tensor) -> Encoded:
        """Images (B, 3, H, W), their sides rounded up to whole patches."""
        x, size = self.backbone.embed(self.whole(image))
        sequences, maps = self.backbone.walk(x)
        classes, background = self.similarity(sequences[-1]).tensor_split([self.num_classes - 1], 1)
        attention = torch.stack([a[:, 1:, 1:] for a in maps])
        attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
        return Encoded(sequences, attention, size, classes - background.amax(1, keepdim=True))

    def whole(self, image: Tensor, scale: float = 1.0) -> Tensor:
        """The image at a scale, its sides rounded up to whole patches."""
        patch = self.backbone.patch_size
        size = [-int(-side * scale // patch) * patch for side in image.shape[-2:]]
        if size == list(image.shape[-2:]):
            return image
        return F.interpolate(image, size, mode="bicubic", align_corners=False, antialias=True)

    @torch.no_grad()
    def cams(self, out: Encoded, class_label: Tensor) -> Tensor:
        """(B, C, h, w) in [0, 1]: Grad-CAMs of the tagged classes, spread along attention, else 0."""
        cam = out.attention.new_zeros(len(class_label), self.num_classes - 1, *out.size)
        with full_precision(cam):
            walk = transition(self.patch_affinity(out))
            for i, tags in enumerate(class_label):
                if len(channels := tags.nonzero()[:, 0]):
                    raw = self.grad_cam(out.sequences[-2][i : i + 1], out.size, channels)
                    refined = spread(normalize_cam(raw, 1e-7), walk[i : i + 1], self.box_threshold)
                    cam[i, channels] = normalize_cam(refined, 1e-7)[0]
        return cam

    def patch_affinity(self, out: Encoded) -> Tensor:
        """(B, N, N)."""
        return out.attention[-self.layers :].mean(0)

    def grad_cam(self, x: Tensor, size: tuple[int, int], channels: Tensor) -> Tensor:
        """Grad-CAM (1, P, h, w) >= 0 at the first norm of the last block.

        Args:
            x: (1, 1 + N, D) before that block.
            channels: (P,) of the present classes, between which and the background the softmax decides.
        """
        last = self.backbone.blocks[-1]
        background = torch.arange(self.num_classes - 1, len(self.text_vectors), device=channels.device)
        with torch.enable_grad():
            normed = last.ln_1(x).detach().requires_grad_()
            out, _ = attend(last, normed, x.detach())
            similarity = self.similarity(out)[0, torch.cat([channels, background])]
            probs = similarity.softmax(0)[: len(channels)]
            gradients = [torch.autograd.grad(p, normed, retain_graph=True)[0][:, 1:] for p in probs]
        weights = torch.cat(gradients).mean(1)  # (P, D)
        return (weights @ normed.detach()[0, 1:].T).relu().unflatten(-1, size)[None]

    def similarity(self, x: Tensor) -> Tensor:
        """Logits (B, C + b) of all texts, from the sequence behind the last block."""
        return self.backbone.logit_scale.exp() * self.backbone.pooled(x) @ self.text_vectors.T
