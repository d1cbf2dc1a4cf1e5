"""Fixtures of the tools' tests."""

from tests.checkpoints import checkpoint, demo_folder, published_toco  # noqa: F401
