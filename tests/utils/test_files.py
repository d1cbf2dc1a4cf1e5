"""One run in a folder."""

import pytest

from utils.files import alone_in


def test_a_second_run_is_refused_and_slurm_is_named(tmp_path, monkeypatch):
    with alone_in(tmp_path):
        with pytest.raises(ValueError, match="in use by process"), alone_in(tmp_path, wait=0):
            pass
        monkeypatch.setenv("SLURM_NTASKS", "2")
        with pytest.raises(ValueError, match="SLURM_NTASKS=2"), alone_in(tmp_path, wait=0):
            pass
    with alone_in(tmp_path, wait=0):
        pass
