"""What the measured rows say: geometric means, tables for the terminal, JSON, and markdown between markers."""

import json
import math
import re
from dataclasses import asdict

from layers import BACKWARD, GROUPS, LAYERS, PASSES
from rich.console import Console
from rich.table import Table

WIDTH = 120  # where the output is not a terminal
MEANS = ("all", *(f"{which} {direction}" for which in ("NCHW", "NHWC", "better") for direction in PASSES))


def console(**options):
    made = Console(highlight=False, **options)
    return made if made.is_terminal else Console(highlight=False, width=WIDTH, **options)


def geomean(values):
    """The geometric mean, or None of nothing."""
    values = list(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def ratios(rows, group, **where):
    """The ratios of a group's timed rows, of those whose fields are as in `where`."""
    return [
        row["ratio"]
        for row in rows
        if row["group"] == group and row["ratio"] and all(row[key] == value for key, value in where.items())
    ]


def better_of_both(rows, group, direction):
    """Ratios of torch's faster layout to fastconv's faster layout, a layer at a time."""
    best = {}
    for row in rows:
        if row["group"] == group and row["direction"] == direction and row["ratio"]:
            ours, theirs = best.get(row["layer"], (math.inf, math.inf))
            best[row["layer"]] = min(ours, row["fastconv"]["median"]), min(theirs, row["torch"]["median"])
    return [theirs / ours for ours, theirs in best.values()]


def summarize(rows):
    """{group: its geometric means and its worst row}, of the groups with a timed row. `all` is over every row, `better`
    over the faster layout of each layer, for either library."""
    summary = {}
    for group in GROUPS:
        timed = [row for row in rows if row["group"] == group and row["ratio"]]
        if not timed:
            continue
        means = {"all": geomean(ratios(rows, group))}
        for direction in PASSES:
            for layout in ("NCHW", "NHWC"):
                means[f"{layout} {direction}"] = geomean(ratios(rows, group, direction=direction, layout=layout))
            means[f"better {direction}"] = geomean(better_of_both(rows, group, direction))
        worst = min(timed, key=lambda row: row["ratio"])
        means["worst"] = {key: worst[key] for key in ("layer", "layout", "direction", "ratio")}
        summary[group] = means
    return summary


def headline(summary):
    """(group, geometric mean) of the group that is lowest."""
    return min(((group, means["all"]) for group, means in summary.items()), key=lambda pair: pair[1])


def abbreviate(text):
    return text.replace("forward", "fwd").replace("backward", "bwd")


def worst_row(means):
    worst = means["worst"]
    return abbreviate(f"{times(worst['ratio'])} {worst['layer']} {worst['layout']} {worst['direction']}")


def times(ratio):
    return f"{ratio:.2f}×" if ratio else "–"


def three_digits(value):
    """0.0123, 0.123, 1.23, 12.3, 123, 1234: no exponents."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def milliseconds(timing):
    if timing is None:
        return "–"
    return f"{three_digits(timing['median'])} ({100 * (timing['high'] - timing['low']) / timing['median']:.0f}%)"


def rate(row):
    if row["rate"] is None:
        return "–"
    return f"{three_digits(row['rate'])} {row['unit']}"


def verdict(row):
    """The check's column: the error, or what went wrong."""
    if row["failure"]:
        return row["failure"]
    check = row["check"]
    if row["ok"]:
        return f"ok {check['error']:.0e}" if check["error"] else "ok exact"
    return f"WRONG {check['tensor']}: {check['error']:.1e}, bound {check['bound']:.1e}, by {check['reference']}"


def group_table(group, rows):
    """A group's rows, one a line."""
    table = Table(title=group, title_justify="left", title_style="bold", box=None, pad_edge=False, show_edge=False)
    table.add_column("layer", no_wrap=True, min_width=max(len(layer.name) for layer in LAYERS))
    table.add_column("layout")
    table.add_column("pass", no_wrap=True, min_width=len(BACKWARD))
    for name, width in (("fastconv ms (IQR)", 17), ("torch ms (IQR)", 14), ("rate", 13), ("of limit", 8), ("ratio", 6)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    table.add_column("check", overflow="fold")
    last = None
    for row in rows:
        name = row["layer"] if row["layer"] != last else ""
        last = row["layer"]
        limit = f"{100 * row['of_limit']:.0f}%" if row["of_limit"] else "–"
        style = "bold red" if not row["ok"] else None
        table.add_row(
            name,
            row["layout"],
            row["direction"],
            milliseconds(row["fastconv"]),
            milliseconds(row["torch"]),
            rate(row),
            limit,
            times(row["ratio"]),
            verdict(row),
            style=style,
        )
    return table


def summary_table(summary):
    table = Table(title="geometric means of the ratios", title_justify="left", title_style="bold", box=None,
                  pad_edge=False)  # fmt: skip
    table.add_column("group", no_wrap=True)
    for key in MEANS:
        table.add_column(abbreviate(key).replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("worst row", no_wrap=True)
    for group, means in summary.items():
        table.add_row(group, *(times(means[key]) for key in MEANS), worst_row(means))
    return table


def plain_table(title, header, lines):
    """A table for the terminal: text at the left, the other columns at the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for cells in lines:
        table.add_row(*cells)
    return table


def as_dicts(rows):
    """Rows as JSON has them: fields, and whether each is right."""
    return [asdict(row) | {"ok": row.ok} for row in rows]


def write_json(path, result):
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=True) + "\n")


def markdown_table(header, lines):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def caption(result):
    return f"{result['date'][:10]}, {result['settings']['dtype']}: {result['title']}."


def markdown_summary(result):
    """A results file as README shows it: where and when, and one line a group."""
    lines = [
        [group, *(times(means[key]) for key in MEANS), worst_row(means)] for group, means in result["summary"].items()
    ]
    return f"{caption(result)}\n\n{markdown_table(['group', *map(abbreviate, MEANS), 'worst row'], lines)}"


def markdown_short(results):
    """Results files, a line each: the machine, and the geometric mean over each group."""
    lines = [
        [f"{machine_name(result)}, {result['settings']['dtype']}"]
        + [times(result["summary"].get(group, {}).get("all")) for group in GROUPS]
        for result in results
    ]
    return markdown_table(["", *GROUPS], lines)


def machine_name(result):
    """The machine without the versions: "AMD EPYC, 2 threads"."""
    return result["title"].split(" · ")[0]


def markdown_rows(result):
    """A results file, one line a row."""
    header = ["layer, layout", "pass", "N", "fastconv ms (IQR)", "torch ms (IQR)", "fastconv", "of limit", "ratio"]
    lines = []
    for group in GROUPS:
        for row in result["rows"]:
            if row["group"] == group:
                limit = f"{100 * row['of_limit']:.0f}%" if row["of_limit"] else "–"
                lines.append([f"{row['layer']} {row['layout']}", row["direction"], str(row["batch"]),
                              milliseconds(row["fastconv"]), milliseconds(row["torch"]), rate(row), limit,
                              times(row["ratio"]) if row["ok"] else verdict(row)])  # fmt: skip
    limits = result["limits"]
    measured = f"Limits: copy {limits['copy_gb_s']:.1f} GB/s, matmul {limits['matmul_gflop_s']:.0f} GFLOP/s."
    return f"{caption(result)} {measured}\n\n{markdown_table(header, lines)}"


def write_between(path, marker, text):
    """Replace what stands between <!-- benchmark:marker --> and its end in a file. ValueError if they are not there."""
    begin, end = f"<!-- benchmark:{marker} -->", f"<!-- /benchmark:{marker} -->"
    page = path.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{path} has no {begin} … {end}")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page, count=1))
