"""The recorded cases themselves: every file has a test that reads it."""

from collections import Counter
from fnmatch import fnmatch

from tests.recorded import GOLDEN, case_name, claimed


def test_every_recorded_file_has_one_test(pytestconfig):
    folder = pytestconfig.getoption("--golden-dir")
    for path in (*GOLDEN.glob("*.npz"), *folder.glob("*.npz")):
        claims = [name for name in claimed() if fnmatch(case_name(path), name)]
        assert len(claims) == 1, f"{len(claims)} tests read {path}"
    assert any(folder.glob("*.npz")), f"{folder} holds no recorded case"
    assert max(Counter(claimed()).values()) == 1
