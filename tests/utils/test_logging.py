"""Log lines reach a terminal that cannot show them, and files are UTF-8."""

import io
import sys

from utils.logging import LOGGER, progress_bar, setup_logging


def test_a_class_name_on_an_ascii_terminal_is_no_error(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    setup_logging(tmp_path)
    LOGGER.info("échelle")
    assert terminal.buffer.getvalue() == b"\\xe9chelle\n"
    assert "échelle" in (tmp_path / "run.log").read_text("utf-8")
    setup_logging()


def test_progress_outside_of_a_terminal_is_a_line_at_times(monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    list(progress_bar(range(1000), desc="short"))
    assert errors.getvalue() == ""
    list(progress_bar(range(3), desc="long", delay=1e-9, mininterval=0.0, miniters=1))
    assert errors.getvalue().splitlines()[-1].startswith("long: 3/3")
