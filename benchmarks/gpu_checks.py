"""Which kernels were seen right on which GPU, as docs/performance.md shows it: from results/gpu-check-*.json, which
tests/gpu_check.py writes."""

import json

from report import markdown_table

NONE_YET = "None yet."


def read(folder):
    """The checks, oldest first."""
    checks = [json.loads(path.read_text()) for path in folder.glob("gpu-check-*.json")]
    return sorted(checks, key=lambda check: (check["date"], check["gpu"]))


def kernel_cell(by_dtype, date):
    """Since when a kernel is right, or in which dtypes it was wrong."""
    wrong = [dtype for dtype, result in by_dtype.items() if result["wrong"]]
    return f"WRONG: {', '.join(wrong)} ({date})" if wrong else f"right ({date})"


def stage_cell(stage):
    counts = ", ".join(f"{count} {what}" for what, count in stage.get("counts", {}).items() if count)
    return f"{stage['status']}: {counts}" if counts else stage["status"]


def markdown_checks(checks):
    """A line for each check, and below it a line for each kernel with the latest verdict of each GPU."""
    if not checks:
        return NONE_YET
    stages = list(dict.fromkeys(name for check in checks for name in check["stages"]))
    lines = []
    for check in checks:
        at = f"{check['gpu']}, {check['date']}, {check['commit'][:7]}, driver {check['driver']}, torch {check['torch']}"
        lines.append([at, *(stage_cell(check["stages"][name]) if name in check["stages"] else "–" for name in stages)])
    gpus = list(dict.fromkeys(check["gpu"] for check in checks))
    latest = {}
    for check in checks:
        for kernel, by_dtype in check["kernels"].items():
            latest[kernel, check["gpu"]] = kernel_cell(by_dtype, check["date"])
    kernels = [
        [kernel, *(latest.get((kernel, gpu), "–") for gpu in gpus)]
        for kernel in sorted({kernel for kernel, _ in latest})
    ]
    return "\n\n".join([markdown_table(["check", *stages], lines), markdown_table(["kernel", *gpus], kernels)])
