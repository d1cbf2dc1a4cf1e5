"""bench/mutate.py: mutants differ in one place, and those that no test notices are named."""

import ast

import pytest

from bench import mutate
from bench.mutate import Options, changeable, changed, run


@pytest.mark.parametrize(
    ("before", "after"),
    [("a <= b", "a < b"), ("a // 2", "a * 2"), ("not a", "not not a"), ("-a", "+a"), ("True", "False"),
     ("0.5", "1.0"), ("0.0", "1.0"), ("a and b", "a or b")],
)  # fmt: skip
def test_every_kind_of_change(before, after):
    node = next(changeable(ast.parse(before)))
    assert ast.unparse(changed(node)) == after


def test_survivors_are_named_and_known_results_are_not_repeated(tmp_path, monkeypatch, capsys):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses/sum.py").write_text("def same(a):\n    return a * 1\n")
    (tmp_path / "tests/losses").mkdir(parents=True)
    (tmp_path / "tests/losses/test_sum.py").write_text(
        "from losses.sum import same\n\ndef test_same():\n    assert same(2) == 2\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "import_libraries", lambda: None)
    options = Options(files=["losses/sum.py"], out=tmp_path / "out.jsonl")
    assert run(options) == {"killed": 1, "survived": 1}  # a / 1 is a * 1
    assert "a * 1 -> a / 1" in capsys.readouterr().out
    lines = options.out.read_text()
    assert run(options)["killed"] == 1 and options.out.read_text() == lines
