import pytest
import torch


@pytest.fixture
def double_precision(monkeypatch):
    """What training computes in float32, a test with double inputs computes in double precision too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
