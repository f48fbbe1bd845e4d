"""Writes the tables of README.md and docs/performance.md from benchmarks/results/*.json.

    python benchmarks/run.py --out benchmarks/results && python benchmarks/readme.py

README has a line for each machine between <!-- benchmark:short --> and its end, and a line for each group between
<!-- benchmark:cpu --> and its end, and the same for cuda;
docs/performance.md has a line for each row, between <!-- benchmark:cpu rows --> and its end, the tables of extras.py
between <!-- benchmark:cpu more --> and its end, those of whole networks, where they were measured, between
<!-- benchmark:cpu models --> and its end, what was checked on which GPU, between <!-- benchmark:gpu-check --> and its
end, and likewise floors: what the layers must take on an H200.
"""

import json
from pathlib import Path

import floors
import gpu_checks
import run_models
from extras import TABLES
from report import caption, markdown_rows, markdown_short, markdown_summary, markdown_table, write_between

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"cpu": "a CPU", "cuda": "a GPU"}
NOTHING = "not measured"


def results(folder, device):
    """The results of a device, float32 first. Quick and filtered ones stay out of the tables."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{device}-*.json"))]
    whole = [result for result in found if not (result["settings"]["quick"] or result["settings"]["filter"])]
    return sorted(whole, key=lambda result: result["settings"]["dtype"] != "float32")


def markdown_extras(result):
    """The tables of extras.py that a results file has, each under its title; "" if it has none."""
    parts = [
        f"**{table.TITLE}**\n\n{markdown_table(list(table.HEADER), table.lines(result[name]))}"
        for name, table in TABLES.items()
        if result.get(name)
    ]
    return "\n\n".join([caption(result), *parts]) if parts else ""


def markdown_models(path):
    """The networks of a results file of run.py models, as docs/performance.md shows them."""
    if not path.exists():
        return f"Whole networks: {NOTHING}."
    result = json.loads(path.read_text())
    tables = [run_models.timing_table(result["rows"]), run_models.memory_table(result["rows"])]
    titles = [
        f"networks, {result['settings']['layout'].upper()}",
        "a training step, MiB at its peak beyond the parameters",
    ]
    parts = [
        f"**{title}**\n\n{markdown_table([name.replace(chr(10), ' ') for name in header], lines)}"
        for title, (header, lines) in zip(titles, tables, strict=True)
    ]
    return "\n\n".join([caption(result), *parts])


def main():
    short = []
    for device in ("cpu", "cuda"):
        measured = results(ROOT / "benchmarks" / "results", device)
        short.append(markdown_short(measured) if measured else f"On {NAMES[device]}: {NOTHING}.")
        summary = "\n\n".join(map(markdown_summary, measured)) or NOTHING
        rows = "\n\n".join(map(markdown_rows, measured)) or NOTHING
        write_between(ROOT / "README.md", device, summary)
        write_between(ROOT / "docs" / "performance.md", f"{device} rows", rows)
        more = (
            "\n\n".join(filter(None, map(markdown_extras, measured)))
            or f"Overhead, first calls, memory, threads, cliffs: {NOTHING}."
        )
        write_between(ROOT / "docs" / "performance.md", f"{device} more", more)
        models = markdown_models(ROOT / "benchmarks" / "results" / f"models-{device}.json")
        write_between(ROOT / "docs" / "performance.md", f"{device} models", models)
        print(f"{device}: {len(measured)} results" if measured else f"{device}: {NOTHING}")
    write_between(ROOT / "README.md", "short", "\n\n".join(short))
    write_between(ROOT / "docs" / "performance.md", "floors", floors.markdown_floors())
    checks = gpu_checks.read(ROOT / "benchmarks" / "results")
    write_between(ROOT / "docs" / "performance.md", "gpu-check", gpu_checks.markdown_checks(checks))
    print(f"gpu-check: {len(checks)} results")


if __name__ == "__main__":
    main()
