"""Stages as a pipeline calls them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from engine.config.options import fill


def call(module: ModuleType, options: Mapping[str, Any]) -> Any:
    """``run`` of a tool with the options of a mapping."""
    return module.run(fill(module.Options, options))
