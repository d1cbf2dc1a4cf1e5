"""CLIP's image and text towers, through open_clip (optional: ``pip install open_clip_torch``).

B images, D width of the image tower, E width of the shared space, (h, w) patches, N = h * w, T texts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.timm_net import renormalize
from models.backbones.vit import PlainViT, checked_layer, resize_pos_embed, to_map, whole_patches


class OpenClip(PlainViT):
    """The image tower of a CLIP model as a backbone for images of any size, and its text tower.

    Args:
        model: a plain ViT of ``open_clip.list_models()``; OpenAI's weights need ViT-B-16-quickgelu.
        weights: a tag of open_clip, which is downloaded, or a local file; None: random ones.
        aux_layer: block whose output is ``aux_tokens``.
        config: changes of the model's config in open_clip (``embed_dim``, ``vision_cfg``, ``text_cfg``).
    """

    def __init__(
        self,
        model: str = "ViT-B-16-quickgelu",
        weights: str | None = None,
        aux_layer: int = -3,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        net, self.tokenize = open_clip_model(model, weights, config or {})
        visual = net.visual
        if not hasattr(visual, "class_embedding") or visual.attn_pool is not None:
            raise ValueError(f"{model} is no plain ViT: take ViT-B-16, ViT-L-14 or another of that kind")
        self.visual, self.logit_scale = visual, net.logit_scale
        del net.visual
        self.texts: nn.Module | None = net  # the rest; None where the text vectors are known
        self.embed_dim, self.patch_size = visual.conv1.out_channels, visual.patch_size[0]
        self.blocks = visual.transformer.resblocks
        self.depth = len(self.blocks)
        self.aux_layer = checked_layer(aux_layer, self.depth)
        self.mean, self.std = (tuple(255 * v for v in x) for x in (visual.image_mean, visual.image_std))

    def intermediates(self, image: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        x, size = self._sequence(image)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layers:
                maps.append(to_map(x[:, 1:], size))
        return self.visual.ln_post(x), maps

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The sequence (B, 1 + N, D) before the first block and (h, w), of images normalised as all are."""
        return self._sequence(renormalize(self, image))

    def walk(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The sequence (B, 1 + N, D) behind every block, and the attention (B, 1 + N, 1 + N) in each."""
        sequences, maps = [], []
        for block in self.blocks:
            x, attention = attend(block, block.ln_1(x), x)
            sequences.append(x)
            maps.append(attention)
        return sequences, maps

    def attention(self, image: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """The attention (B, 1 + N, 1 + N) of every block and (h, w), of images normalised as all are."""
        x, size = self.embed(image)
        return self.walk(x)[1], size

    def pooled(self, x: Tensor) -> Tensor:
        """Unit vectors (B, E) of the shared space, from the mean of the patches of the last sequence."""
        return F.normalize(self.visual.ln_post(x)[:, 1:].mean(1) @ self.visual.proj, dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (T, E)."""
        assert self.texts is not None
        ids = self.tokenize(list(texts)).to(self.logit_scale.device)
        return F.normalize(self.texts.encode_text(ids), dim=-1)

    def _sequence(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        visual = self.visual
        patches = visual.conv1(whole_patches(image, self.patch_size))
        size = patches.shape[-2], patches.shape[-1]
        cls_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        positions = resize_pos_embed(visual.positional_embedding[None], visual.grid_size, size)
        x = torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], 1) + positions
        return visual.ln_pre(visual.patch_dropout(x)), size


def attend(block: Any, normed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a block of open_clip makes of ``x``, given its first norm, and its attention."""
    mixed, attention = block.attn(normed, normed, normed, need_weights=True)
    x = x + block.ls_1(mixed)
    return x + block.ls_2(block.mlp(block.ln_2(x))), attention


def open_clip_model(model: str, weights: str | None, config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """A model of open_clip and its tokenizer, see ``OpenClip``."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("backbone open_clip needs 'pip install open_clip_torch'") from error
    if (whole := open_clip.get_model_config(model)) is None:
        raise ValueError(f"open_clip has no model '{model}'; it has {', '.join(open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is not None and weights not in tags and not Path(weights).is_file():
        raise ValueError(f"{model} has no weights '{weights}', which is no file; it has {', '.join(tags)}")
    changes = {k: {**whole[k], **v} if isinstance(v, Mapping) else v for k, v in config.items()}
    try:
        net = open_clip.create_model(model, pretrained=weights, **changes)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"the weights '{weights}' of {model} could not be loaded ({str(error)[:200]}). Without a "
            "network, fetch them on another machine and set method.backbone.weights to the path of the file"
        ) from error
    return net, open_clip.get_tokenizer(model, context_length=net.context_length)
