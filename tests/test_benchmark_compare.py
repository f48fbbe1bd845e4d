"""`run.py compare`: which rows count as slower, and the exit code."""

import json
import re
import sys

import pytest
from conftest import ROOT

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.append(str(ROOT / "benchmarks"))

import compare  # noqa: E402
import run  # noqa: E402


def timing(median, spread=0.1):
    return {"median": median, "low": median * (1 - spread / 2), "high": median * (1 + spread / 2), "samples": 9}


def row(layer, ours, theirs=10.0, spread=0.1, **changed):
    return {"layer": layer, "layout": "NCHW", "direction": "forward", "batch": 4, "ok": True,
            "fastconv": timing(ours, spread), "torch": timing(theirs)} | changed  # fmt: skip


def result(*rows, torch="2.13.0", dtype="float32", device="a CPU"):
    return {"date": "2026-01-02T03:04:05", "title": device, "machine": {"device": device, "threads": 2, "torch": torch},
            "settings": {"device": "cpu", "dtype": dtype}, "rows": list(rows)}  # fmt: skip


@pytest.fixture
def compared(tmp_path, capsys):
    """Compares two results; returns (exit code, what was printed)."""

    def compared(a, b, *options):
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, content in zip(paths, (a, b), strict=True):
            path.write_text(json.dumps(content))
        code = run.main(["compare", *map(str, paths), *options])
        return code, capsys.readouterr().out

    return compared


def verdicts(a, b):
    return {before["layer"]: said["verdict"] for before, _, said in compare.compare(a, b)}


def test_slower_and_faster_are_beyond_the_spread_of_both():
    a = result(row("same", 10), row("within", 10), row("slower", 10), row("faster", 10), row("noisy", 10, spread=0.6))
    b = result(row("same", 10), row("within", 10.9), row("slower", 11.2), row("faster", 8.9), row("noisy", 13))
    assert verdicts(a, b) == {"same": "", "within": "", "slower": "slower", "faster": "faster", "noisy": ""}
    noisy_after = result(row("slower", 11.2, spread=0.3))
    assert verdicts(result(row("slower", 10)), noisy_after) == {"slower": ""}


def test_a_slow_phase_of_the_machine_is_no_regression():
    a, b = result(row("x", 10), row("y", 10)), result(row("x", 20, theirs=20), row("y", 10, theirs=8))
    assert verdicts(a, b) == {"x": "", "y": "slower"}
    (worst, _) = compare.compare(a, b)
    assert worst[2] == {"change": pytest.approx(1.25), "torch": pytest.approx(0.8), "verdict": "slower"}


def test_times_are_taken_as_they_are_where_torch_differs():
    a, b = result(row("x", 10), torch="2.10.0"), result(row("x", 20, theirs=20))
    assert verdicts(a, b) == {"x": "slower"}


def test_rows_are_matched_by_their_identity():
    rows = [row("x", 10), row("x", 10, layout="NHWC"), row("x", 10, direction="backward"), row("x", 10, batch=8)]
    slower = [before | {"fastconv": timing(10 + 10 * (i == 2))} for i, before in enumerate(rows)]
    found = compare.compare(result(*rows), result(*reversed(slower)))
    assert [(before["direction"], said["verdict"]) for before, _, said in found if said["verdict"]] == [
        ("backward", "slower")
    ]


def test_the_exit_code_says_whether_a_row_regressed(compared):
    a = result(row("x", 10), row("y", 10), row("only in A", 10))
    code, printed = compared(a, result(row("x", 10), row("y", 10)))
    assert code == 0 and "2 rows: 0 slower, 0 faster beyond the spread of both, 0 newly wrong; 1 rows of A" in printed
    assert not re.search(r"^y ", printed, re.MULTILINE)
    code, printed = compared(a, result(row("x", 10), row("y", 12)))
    assert code == 1 and re.search(r"^y .* 10\.0 +12\.0 +1\.20× +1\.00× +slower", printed, re.MULTILINE)
    assert not re.search(r"^x ", printed, re.MULTILINE)
    _, printed = compared(a, a, "--all")
    assert len(re.findall(r"^(?:x|y|only in A) ", printed, re.MULTILINE)) == 3


def test_a_row_that_became_wrong_regressed(compared):
    wrong = row("x", 10) | {"ok": False, "fastconv": None, "torch": None}
    code, printed = compared(result(row("x", 10)), result(wrong))
    assert code == 1 and re.search(r"^x .* 10\.0 +– +– +– +WRONG", printed, re.MULTILINE)
    assert compared(result(wrong), result(wrong))[0] == 0
    assert compared(result(wrong), result(row("x", 10)))[0] == 0


def test_what_cannot_be_compared_is_an_error(compared, tmp_path):
    with pytest.raises(SystemExit, match="dtype is float32 in A, bfloat16 in B"):
        compared(result(row("x", 10)), result(row("x", 10), dtype="bfloat16"))
    with pytest.raises(SystemExit, match="no row in common"):
        compared(result(row("x", 10)), result(row("y", 10)))
    for text in ("[]", "{}", "not JSON"):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(SystemExit, match="c.json: "):
            compare.read(tmp_path / "c.json")
    with pytest.raises(SystemExit, match="nothing.json"):
        compare.read(tmp_path / "nothing.json")


def test_other_machines_and_versions_are_named(compared):
    _, printed = compared(result(row("x", 10), device="one", torch="2.10.0"), result(row("x", 10), device="another"))
    assert "device: one in A, another in B" in printed and "torch: 2.10.0 in A, 2.13.0 in B" in printed


def test_results_of_the_benchmark_can_be_compared(compared):
    measured = json.loads((ROOT / "benchmarks" / "results" / "cpu-float32.json").read_text())
    code, printed = compared(measured, measured)
    assert code == 0 and f"{len(measured['rows'])} rows: 0 slower, 0 faster" in printed
