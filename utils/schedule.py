"""Values that change during training, written in a config as ``[[from_step, value], ...]``."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any


class Schedule:
    """A piecewise constant function of the training step.

    Args:
        spec: a constant, or a list of ``[from_step, value]`` pairs; ``value`` holds from ``from_step``
            (counted from 0) until the next pair takes over. Pairs ascend and the first begins at 0.
    """

    def __init__(self, spec: Any) -> None:
        if not isinstance(spec, Sequence) or isinstance(spec, str):
            spec = [[0, spec]]
        try:
            self.starts: list[int] = [int(start) for start, _ in spec]
            self.values: list[Any] = [value for _, value in spec]
        except (TypeError, ValueError) as error:
            raise ValueError(f"a schedule is a value or a list of [step, value], got {spec!r}") from error
        if self.starts[:1] != [0] or any(b <= a for a, b in zip(self.starts, self.starts[1:])):
            raise ValueError(f"the steps of a schedule must start at 0 and ascend, got {spec!r}")

    def __call__(self, step: int) -> Any:
        """The value in force at ``step``."""
        return self.values[bisect_right(self.starts, step) - 1]
