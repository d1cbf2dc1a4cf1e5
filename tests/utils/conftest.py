"""Fixtures of the utils' tests."""

import socket

import pytest


@pytest.fixture
def free_port():
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
