"""The chart: torch's time over fastconv's for every layer, forward and backward, by group."""

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from layers import GROUPS, PASSES  # noqa: E402

COLOURS = {"NCHW": "#2f6fa8", "NHWC": "#e08a2e", "NC": "#6b6b6b"}
LINE = 0.30  # inches for a layer


def entries(rows):
    """[(group, [(layer, {(direction, layout): ratio})])] in the order of the report."""
    groups = []
    for group in GROUPS:
        layers = {}
        for row in rows:
            if row["group"] == group:
                layers.setdefault(row["layer"], {})[row["direction"], row["layout"]] = row["ratio"]
        if layers:
            groups.append((group, list(layers.items())))
    return groups


def draw(result, path):
    """Writes the chart of a results file as PNG."""
    groups = entries(result["rows"])
    lines = sum(len(layers) + 1 for _, layers in groups)
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(11, 1.6 + LINE * lines), layout="constrained")
    figure.suptitle(f"torch's time / fastconv's, {result['settings']['dtype']}", fontsize=13, x=0.01, ha="left")
    ratios = [row["ratio"] for row in result["rows"] if row["ratio"]] or [1.0]
    low, high = min(0.5, *ratios) / 1.4, max(2.0, *ratios) * 1.4
    for axis, direction in zip(axes, PASSES, strict=True):
        draw_direction(axis, groups, result["summary"], direction, low, high)
    axes[0].set_yticks(*ticks(groups), fontsize=8)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
    axes[0].set_ylim(lines - 0.3, -0.8)
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in GROUPS else "normal")
    layouts = sorted({row["layout"] for row in result["rows"]}, key=list(COLOURS).index)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[layout]) for layout in layouts]
    figure.legend(handles, layouts, loc="upper right", ncols=len(layouts), frameon=False, fontsize=9)
    figure.supxlabel(f"{result['title']} · {result['date'][:10]}", fontsize=8, color="#555555")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ticks(groups):
    positions, labels, y = [], [], 0
    for group, layers in groups:
        for name in (group, *(layer for layer, _ in layers)):
            positions.append(y)
            labels.append(name)
            y += 1
    return positions, labels


def draw_direction(axis, groups, summary, direction, low, high):
    y = 0
    for group, layers in groups:
        mean = summary.get(group, {})
        means = [
            f"{layout} {mean[f'{layout} {direction}']:.2f}×" for layout in COLOURS if mean.get(f"{layout} {direction}")
        ]
        axis.axhspan(y - 0.5, y + 0.5, color="#eeeeee", zorder=0)
        axis.text(low * 1.03, y, "geometric mean  " + "   ".join(means), fontsize=7.5, va="center", color="#333333")
        y += 1
        for _, values in layers:
            measured = [(layout, ratio) for (way, layout), ratio in values.items() if way == direction]
            height = 0.8 / max(1, len(measured))
            for i, (layout, ratio) in enumerate(measured):
                at = y - 0.4 + (i + 0.5) * height
                if ratio:
                    axis.barh(at, ratio - 1, left=1, height=height * 0.92, color=COLOURS[layout], zorder=2)
                    right = ratio >= 1
                    axis.text(ratio * (1.02 if right else 0.98), at, f"{ratio:.2f}", fontsize=6, va="center",
                              ha="left" if right else "right", color="#333333", zorder=3)  # fmt: skip
                else:
                    axis.text(1.02, at, "wrong", fontsize=6, va="center", color="#c00000")
            y += 1
    axis.axvline(1, color="black", linewidth=0.8, zorder=4)
    axis.set_xscale("log", base=2)
    axis.set_xlim(low, high)
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    axis.set_xticks([2.0**p for p in powers], [f"1/{2**-p}×" if p < 0 else f"{2**p}×" for p in powers])
    axis.minorticks_off()
    axis.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=1)
    axis.set_title(direction, fontsize=10, loc="left")
    axis.set_xlabel("← torch faster · fastconv faster →", fontsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
