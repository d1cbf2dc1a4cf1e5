"""Turn a folder of CAM files of IRN, CDA, PSA or SEAM into ours.

    python tools/exchange_cams.py --input their/cam --out logs/cam

Their files (.npy) are pickles; they are read by a guarded reader that runs no code. Run again, it skips what
is finished.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option


@dataclass(kw_only=True)
class Options:
    input: Path = option(meaning="folder of .npy files, also in subfolders", reads=True)
    out: Path = option(meaning="folder for the new files")


def run(options: Options) -> Path:
    """Convert every file that is not there yet; returns the output folder.

    PSA's files of images without classes do not say how large the image is: they are skipped and counted.
    """
    from utils.cam_files import cam_path, save_cam
    from utils.exchange import NoClassError, load_foreign_cam
    from utils.files import claim_folder, has_date, keep_date, origin_of
    from utils.logging import progress_bar

    source, out = options.input, options.out
    names = sorted(path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.npy"))
    if not names:
        raise FileNotFoundError(f"no .npy files in {source}")
    claim_folder(out, {"input": origin_of(source)})
    empty = []
    for name in progress_bar(names, desc="convert", unit="file"):
        path, theirs = cam_path(out, name), source / f"{name}.npy"
        if not has_date(path, theirs):
            try:
                save_cam(path, load_foreign_cam(theirs), "float32")
                keep_date(path, theirs)
            except NoClassError:
                empty.append(name)
    print(f"output   {out}   ({len(names) - len(empty)} files)")
    if empty:
        print(f"skipped  {len(empty)} files without classes, which lack the image size; first {empty[0]}")
    return out


if __name__ == "__main__":
    command_line(Options, run, __doc__)
