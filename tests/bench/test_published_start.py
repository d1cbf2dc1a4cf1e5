"""bench/published_start.py: the draws of the authors' program, and that training begins with them."""

import torch
from safetensors.torch import load_file

from bench.published_start import Options, draw_published_start, run
from datasets.base import WeakSegDataset
from datasets.voc import voc_split
from engine.config.load import load_config
from engine.train import run as train
from methods.toco import ToCo
from tests.checkpoints import demo_folder  # noqa: F401
from utils.image import normalize, resize
from utils.weights import load_checkpoint

DEMO = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 48}


def test_start_of_the_authors_program(voc20_mini, deit_tiny):
    """Its log of ``mini`` begins at a segmentation loss of 3.0441, which tells its decoder's first weights
    from other draws, and with much confident background: no class answers less than `person`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = ToCo(21, {"name": "deit_tiny_patch16_224", "pretrained": str(deit_tiny)})
        draw_published_start(method)
    split = voc_split(voc20_mini, "train", masks="SegmentationClass", tags="image_labels.txt")
    photos = [WeakSegDataset(split)[index]["image"] for index in range(0, len(split), 40)]
    images = torch.cat([resize(normalize(photo)[None], (224, 224)) for photo in photos])
    with torch.no_grad():
        out = method.network(images)
        losses = -out.seg_logits.log_softmax(1).mean((0, 2, 3))
        answers = method.classifier(out.tokens.patch_tokens.mean((0, 2, 3))[None, :, None, None]).flatten()
    assert abs((losses[0] + losses[1:].mean()) / 2 - 3.0441) < 0.004
    assert answers[14] == answers.min() < -1


def test_training_begins_with_the_file(demo_folder, tmp_path):  # noqa: F811
    small = [f"data.root={demo_folder}", "data.crop_size=48", "method.local_crop_size=16", "device=cpu"]
    file = run(Options(out=tmp_path / "start.safetensors", config="configs/toco/demo.yaml", overrides=small))
    quick = ["train.steps=1", "train.batch_size=2", "data.num_workers=0", "optim.lr=0", "data.val_set=null"]
    overrides = [*small, *quick, f"train.resume={file}", f"work_dir={tmp_path / 'run'}"]
    train(load_config("configs/toco/demo.yaml", overrides))
    trained = load_checkpoint(tmp_path / "run" / "last.pth")["model"]
    for key, value in load_file(file).items():
        torch.testing.assert_close(trained[key], value)  # the teacher moves, by rounding alone
