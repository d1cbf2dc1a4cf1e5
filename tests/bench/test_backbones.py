"""The table of backbones."""

from bench.backbones import NAMES, TEXT, Options, run
from tests.conftest import ROOT


def test_rows_say_what_works_and_what_is_refused(tmp_path):
    out = tmp_path / "backbones.md"
    vit, convnext, unknown = run(
        Options(names=["test_vit3", "test_convnext", "nothing.Here"], sizes=[96], threads=1, out=out)
    )
    assert "tokens | 16 |" in vit and float(vit.split("|")[6]) < 1e-5
    assert "maps | 4, 8" in convnext and "refused" in unknown
    assert out.read_text().endswith(f"{vit}\n{convnext}\n{unknown}\n")


def test_the_documents_table_has_every_name():
    text = (ROOT / "docs" / "backbones.md").read_text()
    assert text.startswith(TEXT[:400])
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")][-len(NAMES) :] == NAMES
