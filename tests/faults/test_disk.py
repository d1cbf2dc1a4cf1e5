"""A disk that is full or cannot be read costs no more than the steps since the last checkpoint."""

import resource
from functools import partial

import pytest

from tests.engine.test_trainer import assert_same, interrupted, killed, last_good, resume, trainer
from utils.files import write_atomic
from utils.image import write_mask


@pytest.fixture
def full_disk():
    """Files above a size that the test sets cannot be written, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_continues(tmp_path, full_disk):
    trainer(tmp_path / "whole").fit()
    folder = tmp_path / "parts"
    size = (tmp_path / "whole/last.pth").stat().st_size // 2
    with pytest.raises(OSError, match=r"last\.pth"):
        trainer(folder, partial(interrupted, at=4, by=partial(full_disk, size))).fit()
    full_disk(resource.RLIM_INFINITY)
    assert last_good(folder).state["step"] == 3
    assert not list(folder.glob(".*.tmp"))
    resume(folder).fit()
    assert_same(folder, tmp_path / "whole")


def test_a_full_disk_leaves_no_half_of_a_label(tmp_path, full_disk):
    write_atomic(tmp_path / "a.json", b"before")
    full_disk(4)
    with pytest.raises(OSError, match=r"a\.json"):
        write_atomic(tmp_path / "a.json", b"much more text")
    with pytest.raises(OSError, match=r"b\.png"):
        write_mask(tmp_path / "b.png", [[0, 1], [2, 3]])
    full_disk(resource.RLIM_INFINITY)  # before pytest writes, perhaps to a file
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"before"


def test_a_checkpoint_that_cannot_be_read_costs_the_steps_after_the_one_before(tmp_path):
    trainer(tmp_path / "whole").fit()
    folder = tmp_path / "parts"
    with pytest.raises(InterruptedError):
        trainer(folder, partial(interrupted, at=7, by=killed)).fit()
    last = folder / "last.pth"
    last.unlink()
    last.mkdir()
    run = resume(folder)
    assert run.step == 3
    last.rmdir()
    run.fit()
    assert_same(folder, tmp_path / "whole")
