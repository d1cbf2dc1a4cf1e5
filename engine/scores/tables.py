"""Tables of text for the terminal and the log."""

from collections.abc import Sequence

from torch import Tensor


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table, with a rule in front of the row ``mIoU`` or ``mean``."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = "-+-".join("-" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])

    lines = [line(header), rule]
    for row in rows:
        lines += [rule] if row[0] in ("mIoU", "mean") else []
        lines.append(line(row))
    return "\n".join(lines)


def number(value: Tensor | float, is_share: bool = True) -> str:
    """A share in percent, or a ratio; ``-`` where it is not defined."""
    number = float(value)
    if number != number:
        return "-"
    return f"{100 * number:.2f}" if is_share else f"{number:.3f}"
