"""Options that several tools have."""

from dataclasses import dataclass
from pathlib import Path

from engine.config.options import option


@dataclass(kw_only=True)
class DataOptions:
    """Whose data set a tool works on."""

    model_path: Path | None = option(None, "checkpoint that names the data set; or config=FILE", reads=True)
    overrides: list[str] = option([], "changes of the config, or config=FILE", free=True)

    def changes(self) -> list[str]:
        """``key=value`` changes of the config."""
        return [item for item in self.overrides if not item.startswith("config=")]


@dataclass(kw_only=True)
class CheckpointOptions(DataOptions):
    """Which checkpoint runs over which images."""

    model_path: Path = option(meaning="checkpoint, also of a published program", reads=True)
    infer: str | None = option(
        None, "split, list (.txt), photo or folder; default: val_set or train_set", reads="images"
    )
    overrides: list[str] = option([], "changes of the checkpoint's config", free=True)
    device: str = option("auto", "auto, cpu or cuda", free=True)


@dataclass(kw_only=True)
class ImageOptions(CheckpointOptions):
    """How a checkpoint writes a file for each image."""

    out: Path | None = option(None, "output folder; default: beside the checkpoint, named after the protocol")
    precision: str = option("fp32", "of the network", choices=("fp32", "bf16", "auto"))
    num_workers: int = option(2, "processes that decode images", free=True)
