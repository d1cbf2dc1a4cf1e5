"""A page for the browser: drop a photo, tick or guess its tags, and see mask, areas and CAMs.

    python tools/app.py --model_path logs/my_run/last.pth

Needs gradio (pip install gradio). Photos stay on this machine, and no other machine sees the page unless
``--host 0.0.0.0`` says so.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    model_path: Path = option(meaning="checkpoint, also of a published program", reads=True)
    host: str = option("127.0.0.1", "address that the page listens on")
    port: int = option(7860, "of the page")
    device: str = option("auto", "auto, cpu or cuda", free=True)
    overrides: list[str] = option([], "changes of the checkpoint's config", free=True)


def run(options: Options) -> None:
    """Serve the page until it is interrupted."""
    page = build(options.model_path, options.device, options.overrides)
    page.launch(server_name=options.host, server_port=options.port)


def build(model_path: Path, device: str = "auto", overrides: Sequence[str] = ()) -> Any:
    """The page, not yet served."""
    import gradio as gr

    from datasets.lists import real_classes
    from engine.predictor import Predictor, tag2mask
    from utils.drawing import cam_overlay
    from utils.outlines import outlined_overlay

    plain = tag2mask(model_path, device=device, overrides=overrides)
    _, *classes = real_classes(plain.names).values()
    models = {False: plain, True: Predictor(plain.loaded, plain.label, crf=True)}

    def guess(photo: Any) -> list[str]:
        """The classes that the classifier finds."""
        if photo is None:
            raise gr.Error("Drop a photo first.")
        return list(plain.predict(photo).cam)

    def segment(photo: Any, tags: list[str], crf: bool) -> tuple[Any, dict[str, float], list[Any], str]:
        """Picture of the mask, areas, a picture of the CAM for each tag, and how the mask was made."""
        if photo is None:
            raise gr.Error("Drop a photo first.")
        masks = models[crf].predict(photo, tags or None)
        cams = [
            (cam_overlay(photo, cam[None], [masks.names.index(name)]), name)
            for name, cam in masks.cam.items()
        ]
        about = f"{masks.protocol} · {plain.loaded.path}"
        return outlined_overlay(photo, masks.label, masks.names), masks.area, cams, about

    with gr.Blocks(title="tag2mask", analytics_enabled=False) as page:
        gr.Markdown("# Photo to mask")
        if not plain.loaded.decoder_is_trained:
            gr.Markdown("The decoder of this checkpoint was not trained: masks are made from CAMs.")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="Photo")
                tags = gr.CheckboxGroup(classes, label="Tags (none: the network decides)", elem_id="tags")
                crf = gr.Checkbox(label="Refine the mask along edges (CRF)")
                with gr.Row():
                    guess_button = gr.Button("Guess tags")
                    segment_button = gr.Button("Segment", variant="primary")
            with gr.Column():
                mask = gr.Image(label="Mask", interactive=False)
                areas = gr.Label(label="Area", show_heading=False)
                cams = gr.Gallery(label="CAM of each tag", columns=3)
                about = gr.Markdown()
        guess_button.click(guess, photo, tags)
        segment_button.click(segment, [photo, tags, crf], [mask, areas, cams, about])
    return page


if __name__ == "__main__":
    command_line(Options, run, __doc__)
