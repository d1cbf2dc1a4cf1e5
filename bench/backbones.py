"""Try backbones by name with random weights: the rows of the table of docs/backbones.md.

python bench/backbones.py --write
python bench/backbones.py --names vit_small_patch14_dinov2 swin_tiny_patch4_window7_224
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config.options import command_line, option

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
RULE = 10 * "|---" + "|\n"  # between the head of the table and its rows, which end the page


@dataclass(kw_only=True)
class Options:
    """Which backbones, and where the rows go."""

    names: list[str] = option([], "names of backbones; default: those of the table")
    sizes: list[int] = option([224, 448], "sides of the images, pixels", least=1)
    threads: int = option(1, "CPU threads", least=1)
    page: Path = option(PAGE, "page with the table")
    write: bool = option(False, "put the rows in the place of those of the page")


def run(options: Options) -> list[str]:
    """Print and return a row for each backbone; what fails is in its row."""
    import torch

    from bench.try_backbone import row

    torch.set_num_threads(options.threads)
    text, rule, table = options.page.read_text().partition(RULE)
    rows = []
    for name in options.names or [line.split()[1] for line in table.splitlines()]:
        try:
            rows.append(row(name, options.sizes))
        except (ImportError, KeyError, ValueError) as error:
            rows.append(f"| {name} | refused: {str(error).partition('. ')[0]} |" + 8 * " |")
        print(rows[-1], flush=True)
    if options.write:
        options.page.write_text(text + rule + "\n".join(rows) + "\n")
    return rows


if __name__ == "__main__":
    command_line(Options, run, __doc__)
