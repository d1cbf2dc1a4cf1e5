"""Turn a folder of CAM files into the form of another repository, or the other way.

    python tools/exchange_cams.py --input their/cam --out logs/cam --to tag2mask
    python tools/exchange_cams.py --input logs/my_run/cam --out their/cam --to irn

Their files (.npy: IRN, CDA, PSA, SEAM) are pickles; they are read by a guarded reader that runs no code. Run
again, it skips what is finished.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from engine.config.options import command_line, option
from utils.cam_files import load_cam, save_cam
from utils.exchange import NoClassError, load_foreign_cam, save_irn_cam, save_psa_cam
from utils.files import claim_folder, origin_of

# form: (suffix of the files that are read, suffix of those that are written)
FORMS = {"tag2mask": (".npy", ".npz"), "irn": (".npz", ".npy"), "psa": (".npz", ".npy")}


@dataclass(kw_only=True)
class Options:
    """What the tool is told."""

    input: Path = option(meaning="folder of .npy files (theirs) or .npz files (ours)", reads=True)
    out: Path = option(meaning="folder for the new files")
    to: str = option(meaning="form of the new files; irn: CDA too, psa: SEAM too", choices=tuple(FORMS))
    dtype: str = option("float16", "of tag2mask's files", choices=("float16", "float32"))


def run(options: Options) -> Path:
    """Convert every file that is not there yet; returns the output folder.

    PSA's files of images without classes do not say how large the image is: they are skipped and counted.
    """
    source, out = options.input, options.out
    read, written = FORMS[options.to]
    files = sorted(path.relative_to(source) for path in source.rglob(f"*{read}"))
    if not files:
        raise FileNotFoundError(f"there are no {read} files in {source} (--to {options.to} reads those)")
    settings = {"input": origin_of(source), "to": options.to}
    claim_folder(out, settings | ({"dtype": options.dtype} if options.to == "tag2mask" else {}))
    empty = []
    for file in tqdm(files, desc="convert", unit="file", dynamic_ncols=True):
        target = (out / file).with_suffix(written)
        if target.is_file():
            continue
        if options.to == "tag2mask":
            try:
                save_cam(target, load_foreign_cam(source / file), options.dtype)
            except NoClassError:
                empty.append(file)
        else:
            save = save_irn_cam if options.to == "irn" else save_psa_cam
            save(target, load_cam(source / file))
    print(f"output   {out}   ({len(files) - len(empty)} files)")
    if empty:
        print(f"skipped  {len(empty)} files that hold no class, so no image size either; first {empty[0]}")
    return out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
