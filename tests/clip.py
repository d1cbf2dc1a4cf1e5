"""A CLIP model of random weights that is built in a moment."""

SMALL = {
    "name": "open_clip",
    "model": "ViT-B-16-quickgelu",
    "config": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
    },
}
TEXTS = {"words": ["boat", "sheep", ["car", "van"]], "background_words": ["sky", "grass"]}
