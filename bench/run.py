"""Measure parts of the project against each other and against the compiled originals.

    python bench/run.py crf --labels 21 --threads 1 2 --original_python ~/venv/bin/python
    python bench/run.py energy --threads 1 2
    python bench/run.py walk --labels 1 3 --rounds 1 --repeats 1 --squaring

Every measurement runs in a process of its own; the methods take turns, so that a change of the machine's load
meets all of them. The table holds medians over the rounds, and the ratio to the original is the median of the
ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

# Workers of an original run in a Python that may have nothing but NumPy and that package: other imports are
# local.


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    crf = commands.add_parser("crf", help="DenseCRF on one image size")
    crf.add_argument("--presets", nargs="+", default=["psa", "toco"], help="parameters (default %(default)s)")
    crf.add_argument("--labels", type=int, nargs="+", default=[3, 8, 21])
    crf.add_argument("--steps", type=int, default=10)
    crf.set_defaults(prepare=prepare_crf, methods=crf_methods, size=[375, 500])
    energy = commands.add_parser("energy", help="dense-energy loss")
    energy.add_argument("--labels", type=int, nargs="+", default=[21])
    energy.set_defaults(prepare=prepare_energy, methods=energy_methods, size=[224, 224])
    walk = commands.add_parser("walk", help="IRN's random walk of the CAMs of one image, sparse and dense")
    walk.add_argument("--labels", type=int, nargs="+", default=[3], help="classes (default %(default)s)")
    walk.add_argument("--exp_times", type=int, default=8, help="2 ** exp_times steps (default %(default)s)")
    walk.add_argument(
        "--squaring",
        action="store_true",
        help="also measure the authors' formulation, which squares the dense matrix: minutes on a CPU",
    )
    walk.set_defaults(prepare=prepare_walk, methods=walk_methods, size=[375, 500])
    for command, batch in ((crf, 1), (energy, 4)):
        command.add_argument("--batch", type=int, default=batch, help="images per call (default %(default)s)")
        command.add_argument(
            "--image", type=Path, nargs="*", default=[], help="photos to measure on; default: a generated one"
        )
        command.add_argument("--original_python", help="interpreter that can import the compiled original")
    for command in (crf, energy, walk):
        command.add_argument(
            "--size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default %(default)s)"
        )
        command.add_argument("--threads", type=int, nargs="+", default=[1])
        command.add_argument(
            "--rounds", type=int, default=5, help="processes for each method (default %(default)s)"
        )
        command.add_argument(
            "--repeats", type=int, default=3, help="timed calls in a process, of which the best counts"
        )
        command.add_argument("--device", default="cpu")
        command.add_argument("--out", type=Path, help="write all measurements to this JSON file")
    if arguments is None and sys.argv[1:2] == ["worker"]:
        return worker(json.loads(sys.argv[2]))
    run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every combination and print the table; returns its rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in options.prepare(options, Path(folder)):
            for threads in options.threads:
                methods = options.methods(options, case, threads)
                results: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in methods}
                for _ in range(options.rounds):
                    for name, python, task in methods:
                        results[name].append(_measure(python, task, threads))
                rows += _rows({**case["shown"], "threads": threads}, results)
    print(_table(rows))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    return rows


def worker(task: dict[str, Any]) -> None:
    """Time one method in this process; prints one line of JSON."""
    call = WORKERS[task["method"]](task)
    before = _peak_memory(task["device"])
    if task.get("warm_up", True):
        call()
    wall, cpu = [], []
    for _ in range(task["repeats"]):
        clock = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - clock[0])
        cpu.append(time.process_time() - clock[1])
    peak = _peak_memory(task["device"])
    print(json.dumps({"wall": min(wall), "cpu": min(cpu), "peak_mb": peak, "added_mb": peak - before}))


def _measure(python: str, task: dict[str, Any], threads: int) -> dict[str, float]:
    environment = {
        **os.environ,
        **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")},
    }
    command = [python, __file__, "worker", json.dumps({**task, "threads": threads})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task['method']} failed: {done.stderr.strip().splitlines()[-1:]}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_memory(device: str) -> float:
    """Largest memory so far in MB: of a GPU what torch allocated, else what was resident.

    The latter from the kernel: getrusage would count what the parent held when it forked.
    """
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    return next(
        int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")
    )


def _rows(shown: dict[str, Any], results: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    original = results.get("original")
    rows = []
    for name, runs in results.items():
        row = {**shown, "method": name}
        for key in ("wall", "cpu", "peak_mb", "added_mb"):
            row[key] = statistics.median(r[key] for r in runs)
        if original and name != "original":
            for key in ("wall", "cpu"):
                row[f"{key}_ratio"] = statistics.median(
                    r[key] / o[key] for r, o in zip(runs, original, strict=True)
                )
        rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row))

    def text(value: Any) -> str:
        return (
            f"{value:.3f}"
            if isinstance(value, float) and value < 10
            else f"{value:.0f}"
            if isinstance(value, float)
            else str(value)
        )

    cells = [names, *[[text(row.get(name, "-")) for name in names] for row in rows]]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    return "\n".join(
        "  ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)) for line in cells
    )


def photos(options: argparse.Namespace) -> np.ndarray:
    """(batch, H, W, 3) uint8: the given photos, or smooth colour fields, with some grain."""
    from PIL import Image

    random = np.random.RandomState(0)
    height, width = options.size
    images = []
    for i in range(options.batch):
        if options.image:
            source = Image.open(options.image[i % len(options.image)]).convert("RGB").resize((320, 240))
        else:
            source = Image.fromarray(random.randint(0, 256, (12, 16, 3)).astype(np.uint8)).resize(
                (320, 240), Image.Resampling.BICUBIC
            )
        pixels = np.asarray(source.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
        images.append((pixels + 3 * random.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8))
    return np.stack(images)


def coarse_logits(batch: int, labels: int, height: int, width: int) -> np.ndarray:
    """Logits as a network gives them: coarse normal noise, enlarged; (batch, labels, H, W) float32."""
    import torch

    coarse = np.random.RandomState(1).standard_normal((batch, labels, -(-height // 32), -(-width // 32)))
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(2.5 * coarse), (height, width), mode="bilinear"
    )
    return enlarged.float().numpy()


# --- DenseCRF ---


def prepare_crf(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One case for every preset and number of labels."""
    images = photos(options)
    cases = []
    for labels in options.labels:
        path = folder / f"crf_{labels}.npz"
        np.savez(path, images=images, logits=coarse_logits(options.batch, labels, *options.size))
        for preset in options.presets:
            size = "x".join(map(str, options.size))
            cases.append(
                {
                    "file": str(path),
                    "preset": preset,
                    "shown": {"size": size, "preset": preset, "labels": labels},
                }
            )
    return cases


def crf_methods(
    options: argparse.Namespace, case: dict[str, Any], threads: int
) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, interpreter, task) of the methods to compare."""
    from models.refiners.dense_crf import DenseCRF

    crf = DenseCRF(case["preset"], steps=options.steps)
    task = {
        "file": case["file"],
        "repeats": options.repeats,
        "device": options.device,
        "crf": asdict(crf),
    }
    methods = [
        ("lattice", sys.executable, {**task, "method": "crf"}),
        ("lattice, new size", sys.executable, {**task, "method": "crf_new_size"}),
    ]
    if options.original_python:
        methods.insert(0, ("original", options.original_python, {**task, "method": "crf_original"}))
    return methods


def _crf(task: dict[str, Any], new_size: bool = False) -> Callable[[], object]:
    import torch

    from models.refiners import dense_crf

    torch.set_num_threads(task["threads"])
    with np.load(task["file"]) as data:
        images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous().to(task["device"]) / 255
        probs = torch.from_numpy(data["logits"]).to(task["device"]).softmax(1)
    crf = dense_crf.DenseCRF(**task["crf"])

    def call() -> None:
        if new_size:  # as for the first image of its size
            dense_crf._gaussian_kernel.cache_clear()
        crf.refine(images, probs)
        if images.is_cuda:
            torch.cuda.synchronize()

    crf.refine(images[:1, :, :50, :50], probs[:1, :, :50, :50])
    return call


def _crf_original(task: dict[str, Any]) -> Callable[[], object]:
    import pydensecrf.densecrf as dcrf

    p = task["crf"]
    with np.load(task["file"]) as data:
        images = np.ascontiguousarray(data["images"])
        odds = np.exp(data["logits"] - data["logits"].max(1, keepdims=True))
    probs = odds / odds.sum(1, keepdims=True)

    def call() -> None:
        for image, prob in zip(images, probs):
            labels, height, width = prob.shape
            crf = dcrf.DenseCRF2D(width, height, labels)
            crf.setUnaryEnergy(np.ascontiguousarray(-np.log(prob.clip(1e-5, 1)).reshape(labels, -1)))
            crf.addPairwiseGaussian(sxy=p["gaussian_sigma_xy"], compat=p["gaussian_compat"])
            crf.addPairwiseBilateral(
                sxy=p["bilateral_sigma_xy"],
                srgb=p["bilateral_sigma_rgb"],
                rgbim=image,
                compat=p["bilateral_compat"],
            )
            np.array(crf.inference(p["steps"]))

    return call


# --- dense-energy loss ---


def prepare_energy(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One case for every number of classes; the size is that of the filter, half that of the logits."""
    images = photos(options)
    cases = []
    for labels in options.labels:
        path = folder / f"energy_{labels}.npz"
        np.savez(path, images=images, logits=coarse_logits(options.batch, labels, *options.size))
        shown = {"size": "x".join(map(str, (options.batch, labels, *options.size)))}
        cases.append({"file": str(path), "shown": shown})
    return cases


def energy_methods(
    options: argparse.Namespace, case: dict[str, Any], threads: int
) -> list[tuple[str, str, dict[str, Any]]]:
    """The filter by itself and the loss with its backward pass; the original filter if it can be imported."""
    task = {"file": case["file"], "repeats": options.repeats, "device": options.device}
    methods = [(name, sys.executable, {**task, "method": name}) for name in ("energy_filter", "energy_loss")]
    if options.original_python:
        methods.insert(0, ("original", options.original_python, {**task, "method": "energy_original"}))
    return methods


def _energy_filter(task: dict[str, Any]) -> Callable[[], object]:
    """Lattice and filter of the probabilities, as the original's only function does."""
    import torch

    from ops.lattice import PermutohedralLattice, bilateral_features

    images, logits = _energy_inputs(task)
    values = logits.softmax(1).flatten(2)

    def call() -> None:
        lattice = PermutohedralLattice(bilateral_features(images, 50.0, 15.0))
        lattice.filter(values.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
        if images.is_cuda:
            torch.cuda.synchronize()

    return call


def _energy_loss(task: dict[str, Any]) -> Callable[[], object]:
    """The loss and its gradient on maps of the given size (scale 1)."""
    import torch

    from losses.dense_energy import dense_energy_loss

    images, logits = _energy_inputs(task)
    label = (
        torch.randint(0, 2, logits[:, 0].shape, generator=torch.Generator().manual_seed(0))
        .mul(255)
        .to(logits.device)
    )
    logits.requires_grad_()

    def call() -> None:
        loss = dense_energy_loss(images, logits, label, sigma_xy=50.0, scale=1.0)
        torch.autograd.grad(loss, logits)
        if images.is_cuda:
            torch.cuda.synchronize()

    return call


def _energy_inputs(task: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(task["threads"])
    with np.load(task["file"]) as data:
        images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).float().contiguous()
        return images.to(task["device"]), torch.from_numpy(data["logits"]).to(task["device"])


def _energy_original(task: dict[str, Any]) -> Callable[[], object]:
    """The SWIG module of rloss, built by hand."""
    from bilateralfilter import bilateralfilter_batch

    with np.load(task["file"]) as data:
        images = np.ascontiguousarray(data["images"].transpose(0, 3, 1, 2), dtype=np.float32)
        odds = np.exp(data["logits"] - data["logits"].max(1, keepdims=True))
    values = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    result = np.zeros_like(values).ravel()

    def call() -> None:
        bilateralfilter_batch(images.ravel(), values.ravel(), result, *values.shape, 15.0, 50.0)

    return call


# --- random walk ---


def prepare_walk(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One case for every number of classes: boundaries and CAMs at a quarter of the image size."""
    from PIL import Image

    random = np.random.RandomState(0)
    height, width = (-(-side // 4) for side in options.size)

    def smooth() -> np.ndarray:
        coarse = Image.fromarray(random.random_sample((9, 12)).astype(np.float32))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))

    cases = []
    for labels in options.labels:
        path = folder / f"walk_{labels}.npz"
        np.savez(path, edge=smooth() ** 2, cam=np.stack([smooth() for _ in range(labels)]))
        shown = {"size": "x".join(map(str, options.size)), "classes": labels, "steps": 2**options.exp_times}
        cases.append({"file": str(path), "shown": shown})
    return cases


def walk_methods(
    options: argparse.Namespace, case: dict[str, Any], threads: int
) -> list[tuple[str, str, dict[str, Any]]]:
    """The project's walk, the same steps with the dense matrix, and the squaring of that matrix."""
    task = {"file": case["file"], "repeats": options.repeats, "device": options.device}
    task["exp_times"] = options.exp_times
    methods = [
        ("sparse", sys.executable, {**task, "method": "walk"}),
        ("dense, products", sys.executable, {**task, "method": "walk_dense"}),
    ]
    if options.squaring:
        dense = {**task, "method": "walk_squaring", "warm_up": False}
        methods.append(("dense, squaring", sys.executable, dense))
    return methods


def _walk(task: dict[str, Any]) -> Callable[[], object]:
    import torch

    from models.refiners.random_walk import propagate_to_edge

    cam, edge = _walk_inputs(task)

    def call() -> torch.Tensor:
        walked = propagate_to_edge(cam, edge, exp_times=task["exp_times"])
        if cam.is_cuda:
            torch.cuda.synchronize()
        return walked

    return call


def _walk_dense(task: dict[str, Any], squaring: bool = False) -> Callable[[], object]:
    """The (hw, hw) transition matrix of the authors' program, applied step by step, or squared."""
    import torch
    import torch.nn.functional as F

    from ops.pairs import PathPairs

    cam, edge = _walk_inputs(task)
    height, width = edge.shape
    radius, beta = 5, 10

    def call() -> torch.Tensor:
        pairs = PathPairs(radius)
        walled = F.pad(edge, (radius, radius, 0, radius), value=1.0)
        affinity = 1 - pairs.path_max(walled)
        src, dst = (index.to(edge.device) for index in pairs.indices((walled.shape[0], walled.shape[1])))
        # Numbers of the pixels without the border; -1 in it.
        inside = torch.arange(height * width, device=edge.device).view(height, width)
        number = F.pad(inside, (radius, radius, 0, radius), value=-1).flatten()
        rows, columns = number[src].expand_as(dst), number[dst]
        kept = (rows >= 0) & (columns >= 0)
        rows, columns, values = rows[kept], columns[kept], affinity[kept] ** beta
        transition = torch.eye(height * width, device=edge.device)
        transition[rows, columns] = values
        transition[columns, rows] = values
        transition /= transition.sum(0)
        walked = (cam * (1 - edge)).flatten(1)
        if squaring:
            for _ in range(task["exp_times"]):
                transition = transition @ transition
            walked = walked @ transition
        else:
            for _ in range(2 ** task["exp_times"]):
                walked = walked @ transition
        if cam.is_cuda:
            torch.cuda.synchronize()
        return walked.view(cam.shape)

    return call


def _walk_inputs(task: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(task["threads"])
    with np.load(task["file"]) as data:
        return tuple(torch.from_numpy(data[name]).to(task["device"]) for name in ("cam", "edge"))


WORKERS: dict[str, Callable[[dict[str, Any]], Callable[[], object]]] = {
    "crf": _crf,
    "crf_new_size": lambda task: _crf(task, new_size=True),
    "crf_original": _crf_original,
    "energy_filter": _energy_filter,
    "energy_loss": _energy_loss,
    "energy_original": _energy_original,
    "walk": _walk,
    "walk_dense": _walk_dense,
    "walk_squaring": lambda task: _walk_dense(task, squaring=True),
}


if __name__ == "__main__":
    main()
