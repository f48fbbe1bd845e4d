"""Compares two results of the benchmark, row by row, and says what became slower.

    python benchmarks/run.py compare A.json B.json      # A before, B after

A row regressed if fastconv's time grew beyond the spread of both results: B's lower quartile lies above A's upper one.
Times are taken over torch's median of the same row, which was measured in turn, so that a slow phase of the machine is
no regression; where the results are of different versions of torch, they are taken as they are. A row that was right in
A and is wrong in B regressed too. The exit code is 1 if any did.
"""

import argparse
import json
import sys
from pathlib import Path

from report import console, three_digits, times
from rich.table import Table

IDENTITY = ("layer", "layout", "direction", "batch")
REGRESSED, FASTER, SAME, WRONG = "slower", "faster", "", "WRONG"


def read(path):
    """A results file. SystemExit if it is none."""
    try:
        result = json.loads(Path(path).read_text())
        if not {"title", "machine", "settings", "rows"} <= set(result):
            raise ValueError("it has no rows of a benchmark")
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"{path}: {error}")
    return result


def identity(row):
    return tuple(row[key] for key in IDENTITY)


def quartiles(row, relative):
    """(low, median, high) of fastconv's time: in ms, or over torch's median."""
    unit = row["torch"]["median"] if relative else 1.0
    return tuple(row["fastconv"][key] / unit for key in ("low", "median", "high"))


def compare_rows(before, after, relative):
    """What a row's two measurements say: {change: of the median, above 1 slower; torch: the change of torch's;
    verdict}."""
    if not after["ok"]:
        return {"change": None, "torch": None, "verdict": WRONG if before["ok"] else SAME}
    if not before["ok"]:
        return {"change": None, "torch": None, "verdict": SAME}
    (low, median, high), (low_after, median_after, high_after) = (quartiles(row, relative) for row in (before, after))
    verdict = REGRESSED if low_after > high else FASTER if high_after < low else SAME
    return {
        "change": median_after / median,
        "torch": after["torch"]["median"] / before["torch"]["median"],
        "verdict": verdict,
    }


def compare(a, b):
    """[(A's row, B's row, what they say)] of the rows that both results have, the most slowed first."""
    relative = a["machine"]["torch"] == b["machine"]["torch"]
    after = {identity(row): row for row in b["rows"]}
    found = [
        (row, after[identity(row)], compare_rows(row, after[identity(row)], relative))
        for row in a["rows"]
        if identity(row) in after
    ]
    return sorted(found, key=lambda entry: (entry[2]["verdict"] != WRONG, -(entry[2]["change"] or 0)))


def table(found, relative):
    columns = (
        "layer",
        "layout",
        "pass",
        "A ms",
        "B ms",
        "time over torch's" if relative else "time",
        "torch's own",
        "",
    )
    shown = Table(*columns, box=None, pad_edge=False)
    for column in shown.columns[3:7]:
        column.justify = "right"
    for before, after, said in found:
        style = {REGRESSED: "bold red", WRONG: "bold red", FASTER: "green"}.get(said["verdict"])
        ms = [three_digits(row["fastconv"]["median"]) if row["fastconv"] else "–" for row in (before, after)]
        changes = [times(said["change"]), times(said["torch"])]
        shown.add_row(*identity(before)[:3], *ms, *changes, said["verdict"], style=style)
    return shown


def differences(a, b):
    """What makes two results hard to compare, a line each."""
    for name in ("device", "threads", "torch"):
        if a["machine"].get(name) != b["machine"].get(name):
            yield f"{name}: {a['machine'].get(name)} in A, {b['machine'].get(name)} in B"


def main(arguments):
    """Prints what changed from one result to the other. Returns the exit code: 1 if a row regressed."""
    parser = argparse.ArgumentParser(prog="run.py compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument("--all", action="store_true", help="also the rows that stayed as they were")
    options = parser.parse_args(arguments)
    a, b = read(options.before), read(options.after)
    for name in ("device", "dtype"):
        if a["settings"][name] != b["settings"][name]:
            sys.exit(f"nothing to compare: {name} is {a['settings'][name]} in A, {b['settings'][name]} in B")
    found = compare(a, b)
    if not found:
        sys.exit("nothing to compare: the results have no row in common")

    out = console()
    for name, result in (("A", a), ("B", b)):
        out.print(f"{name}: {result['date'][:16]}, {result['title']}", soft_wrap=True)
    for line in differences(a, b):
        out.print(line, style="yellow")
    shown = [entry for entry in found if options.all or entry[2]["verdict"]]
    if shown:
        out.print(table(shown, a["machine"]["torch"] == b["machine"]["torch"]))
    count = {verdict: sum(said["verdict"] == verdict for _, _, said in found) for verdict in (REGRESSED, WRONG, FASTER)}
    only = len(a["rows"]) - len(found)
    out.print(
        f"{len(found)} rows: {count[REGRESSED]} slower, {count[FASTER]} faster beyond the spread of both, "
        f"{count[WRONG]} newly wrong" + f"; {only} rows of A are not in B" * bool(only),
        style="bold",
    )
    return 1 if count[REGRESSED] or count[WRONG] else 0
