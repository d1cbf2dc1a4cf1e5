"""Write a trained network for use: the weights of inference alone, or a graph that needs no code of ours.

    python tools/export.py --model_path logs/my_run/last.pth --out model.safetensors
    python tools/export.py --model_path logs/my_run/last.pth --out model.onnx

Every tool takes the ``.safetensors`` file as --model_path. ``.onnx`` (needs onnx, onnxscript, onnxruntime)
and ``.pt2`` (torch.export) are compared with the network before they are written (docs/use.md).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

SUFFIXES = (".safetensors", ".onnx", ".pt2")


@dataclass(kw_only=True)
class Options:
    model_path: Path = option(meaning="checkpoint, also of a published program", reads=True)
    out: Path = option(meaning=f"file to write: {', '.join(SUFFIXES)}")
    overrides: list[str] = option([], "changes of the checkpoint's config")


def run(options: Options) -> Path:
    """Export one checkpoint and return the path of the new file.

    Raises:
        ValueError: ``--out`` has another suffix, or the method cannot be exported.
        FileExistsError: ``--out`` exists.
    """
    from engine.inference import load_method

    out = options.out
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out} must end in {', '.join(SUFFIXES)}")
    if out.exists():
        raise FileExistsError(f"{out} exists; delete it or choose another --out")
    loaded = load_method(options.model_path, "cpu", options.overrides)
    print(loaded.describe())
    out.parent.mkdir(parents=True, exist_ok=True)
    writers = {".safetensors": write_weights, ".onnx": write_onnx, ".pt2": write_program}
    about = writers[out.suffix](loaded, out)
    print(f"written  {out} ({out.stat().st_size / 1e6:.1f} MB, {about})")
    return out


def write_weights(loaded: Any, out: Path) -> str:
    """The weights that a prediction needs, with config and class names."""
    from engine.config.load import to_plain
    from utils.weights import save_checkpoint

    state = loaded.method.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(loaded.method.training_only)}
    about = {"config": to_plain(loaded.cfg), "class_names": list(loaded.class_names), "step": loaded.step}
    save_checkpoint(out, {"model": kept, **about})
    return f"{len(kept)} of {len(state)} tensors"


def write_program(loaded: Any, out: Path) -> str:
    """The graph as a program of torch.export."""
    import torch

    from engine.graph import Graph, exported, verify

    graph = Graph(loaded)
    program = exported(graph)
    worst = verify(graph, program.module())
    torch.export.save(program, out, extra_files=_about(loaded, graph))
    return f"sides in multiples of {graph.multiple}, differs by {worst:.1e}"


def write_onnx(loaded: Any, out: Path) -> str:
    """The graph as ONNX, with class names in its metadata."""
    import onnxruntime
    import torch

    from engine.graph import Graph, exported, verify
    from utils.files import write_atomic

    graph = Graph(loaded)
    program = torch.onnx.export(
        exported(graph), input_names=["image"], output_names=list(graph.outputs), verbose=False
    )
    program.model.metadata_props.update(_about(loaded, graph))
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)

    def compute(image: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {"image": image.numpy()})]

    worst = verify(graph, compute)
    write_atomic(out, content)
    return f"sides in multiples of {graph.multiple}, differs by {worst:.1e}"


def _about(loaded: Any, graph: Any) -> dict[str, str]:
    """What a user of a graph must know, as texts."""
    import json

    return {
        "class_names": "\n".join(loaded.class_names),
        "multiple": str(graph.multiple),
        "model": json.dumps(loaded.provenance()),
    }


if __name__ == "__main__":
    command_line(Options, run, __doc__)
