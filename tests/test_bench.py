"""What the benchmarks report: ratios that mean the same everywhere, rows kept per module, the table in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import document
from bench.rows import Row, read, table, write


@pytest.mark.parametrize(
    ("row", "ratio", "missed"),
    [
        pytest.param(Row(name="a", ours=12, peer=10, unit="ms", budget=1.0), 1.2, True, id="slower"),
        pytest.param(Row(name="a", ours=8, peer=10, unit="ms", budget=1.0), 0.8, False, id="faster"),
        pytest.param(Row(name="a", ours=80, peer=100, unit="requests/s", budget=1.2), 1.25, True, id="a lower rate"),
        pytest.param(Row(name="a", ours=200, peer=100, unit="MB/s", budget=1.0), 0.5, False, id="a higher rate"),
        pytest.param(Row(name="a", ours=3, limit=10, unit="MB", budget=0.8), 0.3, False, id="a documented figure"),
        pytest.param(Row(name="a", ours=3, unit="ms"), None, False, id="no peer"),
        pytest.param(Row(name="a", ours=0, peer=1, unit="ms", budget=1.0), None, False, id="nothing at all"),
    ],
)
def test_the_ratio_is_our_cost_over_the_peers(row: Row, ratio: float | None, missed: bool) -> None:
    assert row.ratio == (None if ratio is None else pytest.approx(ratio))
    assert row.missed is missed


def test_a_module_replaces_its_own_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "build" / "bench.json"
    old, other, new = (Row(name=name, ours=1, unit="ms", peer=2, against="x") for name in ("old", "other", "new"))
    write("host", [old], path)
    write("router", [other], path)
    write("host", [new], path)
    assert [(row.module, row.name, row.ratio) for row in read(path)] == [("router", "other", 0.5), ("host", "new", 0.5)]


def test_the_page_gets_a_table_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n")
    row = Row(name="a | b", ours=12, peer=10, unit="ms", budget=1.0, against="x")
    write("host", [row])
    document.update(page, read())
    text = page.read_text()
    assert text.startswith(f"before\n{document.BEGIN}\n") and text.endswith(f"{document.END}\nafter\n")
    assert "| a \\| b | 12 | 10 | ms | x | 1.2 | 1 | missed |" in text and "old" not in text
    assert len({len(line) for line in table([row, row]).splitlines()}) == 1


def test_a_page_without_a_place_for_it_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(LookupError):
        document.update(page, [])
    assert page.read_text() == "nothing here"
