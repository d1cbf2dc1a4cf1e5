"""The diagnosis of a run: a table on its page, and the same numbers as JSON."""

import json
import shutil

import pytest

from tests.stages import call
from tools import diagnose


def test_a_run_gets_a_table_a_page_and_its_numbers(checkpoint, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(checkpoint, folder / "last.pth")
    (folder / "config.yaml").write_text("run_name: run")
    page = call(diagnose, {"run": folder, "device": "cpu", "worst": 2})
    found = json.loads((folder / "diagnosis.json").read_text())
    assert found["images"] == 6 and set(found["errors"]) == {"cam", "aux_cam", "seg"}
    assert [row["name"] in page.read_text() for row in found["worst"]] == [True, True]
    assert "missed class" in capsys.readouterr().out
    with pytest.raises(ValueError, match="visualize"):
        call(diagnose, {"run": folder, "device": "cpu", "overrides": ["data.options.masks=null"]})
