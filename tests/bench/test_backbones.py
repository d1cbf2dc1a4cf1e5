"""The table of backbones."""

from bench.backbones import RULE, Options, run


def test_rows_say_what_works_and_what_is_refused(tmp_path):
    page = tmp_path / "backbones.md"
    names = ("test_vit3", "test_convnext", "nothing.Here")
    page.write_text(f"# Text\n{RULE}" + "".join(f"| {name} | old |\n" for name in names))
    vit, convnext, unknown = run(Options(sizes=[96], page=page, write=True))
    assert "tokens | 16 |" in vit and float(vit.split("|")[6]) < 1e-5
    assert "maps | 4, 8" in convnext and "refused" in unknown
    assert page.read_text() == f"# Text\n{RULE}{vit}\n{convnext}\n{unknown}\n"
