"""Fixtures of tests that keep promises."""

from tests.checkpoints import demo_folder  # noqa: F401
from tests.engine.conftest import split  # noqa: F401
from tests.test_launch import demo  # noqa: F401
