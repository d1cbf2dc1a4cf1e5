"""The weights that the authors' ToCo program begins with: what it draws from ``torch.manual_seed(seed)``.

    python -m tests.methods.author_start start.pth                    # of configs/toco/mini.yaml, seed 0
    python scripts/train_voc.py config=configs/toco/mini.yaml train.resume=start.pth run_name=author_start

Their program seeds one generator and builds encoder, the two projection heads, decoder and classifiers, in
the order of their names in its checkpoints (tests/golden/state_dict_toco.json). Where the random first row of
a classifier decides how a short run goes (docs/results.md), this is the start to compare from.
"""

import sys

import torch
from torch import Tensor, nn

from engine.train import build_method
from methods.toco import ToCo
from models.backbones.vit import ViT
from models.heads import LargeFOV, ProjectionHead
from utils.config import load_config


def author_start(method: ToCo, seed: int) -> dict[str, Tensor]:
    """The state of ``method`` with the new layers as the authors' program draws them; the backbone keeps its
    weights, for theirs are pretrained too.
    """
    num_classes, width = method.num_classes, method.backbone.embed_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw_encoder(method.backbone)
        head, _ = ProjectionHead(width), ProjectionHead(width)  # the teacher's is drawn, then overwritten
        decoder = LargeFOV(width, num_classes)
        classifier, aux_classifier = (nn.Conv2d(width, num_classes - 1, 1, bias=False) for _ in range(2))
    parts = {
        "proj_head": head,
        "teacher_head": head,
        "decoder": decoder,
        "classifier": classifier,
        "aux_classifier": aux_classifier,
    }
    drawn = {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
    }
    state = method.state_dict()
    assert drawn.keys() <= state.keys() and all(drawn[key].shape == state[key].shape for key in drawn)
    return state | drawn


def draw_encoder(backbone: ViT) -> None:
    """Draw as many numbers as their encoder does: every layer as PyTorch makes it, the matrices once more,
    and the 1000-way head that nobody uses.
    """
    linear = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
    linear.append(nn.Linear(backbone.embed_dim, 1000, device="meta"))
    count = sum(
        2 * layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel()) for layer in linear
    )
    count += sum(
        p.numel() for p in (*backbone.patch_embed.parameters(), backbone.pos_embed, backbone.cls_token)
    )
    torch.rand(count)


if __name__ == "__main__":
    cfg = load_config("configs/toco/mini.yaml")
    method = build_method(cfg, num_classes=21)
    torch.save({"model": author_start(method, seed=0)}, sys.argv[1])
