"""`--help` of every command answers at once: printing text loads no science."""

import subprocess
import sys

from tests.conftest import ROOT

CODE = """
import contextlib, io, runpy, sys
for file in sys.argv[1:]:
    sys.argv, shown = [file, "--help"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        runpy.run_path(file, run_name="__main__")
    assert len(shown.getvalue()) > 200, file
    assert "torch" not in sys.modules, file
"""


def test_no_command_loads_torch_for_its_help():
    files = [
        str(file)
        for folder in ("scripts", "tools", "bench")
        for file in (ROOT / folder).glob("*.py")
        if "__main__" in file.read_text() and file.name != "torchrun.py"  # whose options are torch's own
    ]
    assert len(files) > 20
    done = subprocess.run([sys.executable, "-c", CODE, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
