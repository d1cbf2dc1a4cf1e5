"""A method as one graph from pixels to CAM and mask, for torch.export and ONNX.

B images, C foreground classes, (H, W) pixels, multiples of `Graph.multiple`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from engine.inference import LoadedMethod
from methods.base import Predicts
from ops.cam import best_class
from ops.labels import threshold_label
from utils.image import label_dtype, normalize, resize

TOLERANCE = 1e-4


class Graph(nn.Module):
    """Class logits, CAM and mask of images at a single scale; the CAM is that of image and mirrored image.

    The mask is that of the decoder, or where there is none, or an untrained one, that of the CAMs of the
    classes that the classifier finds.

    The method loses the weights that only training needs.

    Raises:
        ValueError: the method predicts nothing by itself.
    """

    def __init__(self, loaded: LoadedMethod) -> None:
        super().__init__()
        if not isinstance(loaded.method, Predicts):
            raise ValueError(f"{loaded.path}: {type(loaded.method).__name__} predicts nothing by itself")
        self.method, self.has_decoder = loaded.method, loaded.decoder_is_trained
        parts = (*self.method.named_children(), *self.method.named_buffers(recurse=False))
        for name in [name for name, _ in parts if f"{name}.".startswith(self.method.training_only)]:
            delattr(self.method, name)
        backbone: Any = self.method.backbone
        self.multiple = int(getattr(backbone, "patch_size", None) or max(backbone.strides))
        out = self.method.predict(normalize(self.sample(1, 2, 2)), (1.0,))
        self.has_decoder = self.has_decoder and out.seg_logits is not None
        self.outputs = ("class_logits", *(["cam"] if out.cam is not None else []), "mask")

    def sample(self, *shape: int) -> Tensor:
        """Random pixels (b, 3, h, w) uint8, for b images of h x w multiples."""
        b, h, w = shape
        random = torch.Generator().manual_seed(0)
        size = (b, 3, h * self.multiple, w * self.multiple)
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=random)

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """`outputs` of images (B, 3, H, W) uint8 RGB: (B, C), (B, C, H, W) in [0, 1], and label (B, H, W)."""
        out = self.method.predict(normalize(image), (1.0,))
        class_logits = out.class_logits.float()
        if self.has_decoder:
            assert out.seg_logits is not None
            scores = resize(out.seg_logits.float(), image.shape[-2:])
            mask = self.method.finish_scores(scores, class_logits[:, None]).argmax(1)
        else:
            assert out.cam is not None
            score, label = best_class(out.cam, self.method.present(class_logits))
            mask = threshold_label(score, label, self.method.background_threshold)
        maps = () if out.cam is None else (out.cam,)
        return class_logits, *maps, mask.to(label_dtype(self.method.num_classes))


def exported(graph: Graph) -> ExportedProgram:
    """The graph for any number of images of any size in multiples.

    Raises:
        ValueError: torch.export cannot follow the method.
    """
    sides = {2: graph.multiple * Dim("h", min=2), 3: graph.multiple * Dim("w", min=2)}
    try:
        with torch.no_grad():
            return torch.export.export(
                graph, (graph.sample(2, 10, 9),), dynamic_shapes={"image": {0: Dim("batch"), **sides}}
            )
    except Exception as error:  # torch.export passes on whatever the method trips over
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(graph.method).__name__} cannot be exported as a graph: {reason}") from error


def verify(graph: Graph, run: Callable[[Tensor], Sequence[Tensor]]) -> float:
    """The largest difference of an exported graph from the network, over other sizes and numbers of images.

    Raises:
        ValueError: it is above `TOLERANCE`, or more than this share of the mask differs.
    """
    worst = 0.0
    for shape in ((1, 12, 12), (3, 6, 13)):
        image = graph.sample(*shape)
        *expected, mask = graph(image)
        *found, found_mask = run(image)
        differences = [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)]
        worst = max(worst, *differences, float((mask != found_mask).float().mean()))
    if not worst <= TOLERANCE:
        raise ValueError(f"the exported graph differs from the network by {worst:.1e}: it is not written")
    return worst
