"""The difference of two rows, seed by seed, from the reports of suites."""

import json

import pytest

from eval.rerun import compare


def write(folder, losses):
    rows = [
        {"model": "llama", "protocol": "tuned", "label": label, "failed_seeds": 0}
        | {"metrics": {"test_loss": {"seeds": list(range(len(values))), "values": values}}}
        for label, values in losses.items()
    ]
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"suite": {"primary": "test_loss"}, "rows": rows}))


@pytest.fixture
def suites(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    write(tmp_path / "one", {"A": [1.0, 2.0, 3.0], "B": [0.9, 1.8, 2.7, 5.0]})
    write(tmp_path / "two", {"A": [1.5, 2.5, 3.5]})


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (["A", "B"], "+0.2000 ± 0.2484"),  # t(2) at 97.5 % is 4.3027; the differences are 0.1, 0.2 and 0.3
        (["two:A", "one:A"], "+0.5000 ± 0.0000"),
    ],
)
def test_differences_are_over_common_seeds(suites, capsys, rows, shown):
    compare.main(["one", *rows])
    assert capsys.readouterr().out == f"llama, tuned, test_loss: {shown}\n"


def test_what_is_not_there_is_named(suites, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["one", "A", "C"])
    assert "one has no row 'C'; it has A; B" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        compare.main(["three", "A", "B"])
    assert "three" in capsys.readouterr().err
