"""The roofline picture: operations a byte against achieved rate, under the machine's own measured ceilings."""

import matplotlib

matplotlib.use("Agg")

import layers  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from machine import DTYPES  # noqa: E402

BY_NAME = {layer.name: layer for layer in layers.LAYERS}
COLOURS = dict(zip(layers.GROUPS, ("#2f6fa8", "#e08a2e", "#4d8f4d", "#a03c64"), strict=False))


def points(result):
    """[{layer, group, layout, direction, intensity: FLOP a byte, fastconv: GFLOP/s, torch: GFLOP/s}] of the timed rows
    that multiply; pooling and BatchNorm have no operations to speak of."""
    element = DTYPES[result["settings"]["dtype"]].itemsize
    found = []
    for row in result["rows"]:
        layer = BY_NAME[row["layer"]]
        flops = layer.flops(row["direction"], row["batch"])
        if not flops or not row["ratio"]:
            continue
        point = {key: row[key] for key in ("layer", "group", "layout", "direction")}
        point["intensity"] = flops / layer.least_bytes(row["direction"], row["batch"], element)
        found.append(point | {library: flops / (row[library]["median"] * 1e6) for library in ("fastconv", "torch")})
    return found


def ceiling(intensity, limits):
    """GFLOP/s that the bandwidth of a copy and the rate of a matmul allow."""
    return np.minimum(limits["copy_gb_s"] * intensity, limits["matmul_gflop_s"])


def draw_roofline(result, path):
    """Writes the picture of a results file as PNG; nothing if no row multiplies."""
    found, limits = points(result), result["limits"]
    if not found:
        return False
    figure, axes = plt.subplots(1, 2, sharex=True, sharey=True, figsize=(11, 5), layout="constrained")
    figure.suptitle(f"roofline, {result['settings']['dtype']}", fontsize=13, x=0.01, ha="left")
    at = [point["intensity"] for point in found]
    intensities = np.geomspace(min(at) / 2, max(at) * 2, 200)
    for axis, direction in zip(axes, layers.PASSES, strict=True):
        axis.plot(intensities, ceiling(intensities, limits), color="black", linewidth=1)
        for point in (point for point in found if point["direction"] == direction):
            shown = {"color": COLOURS[point["group"]], "marker": "s" if point["layout"] == "NHWC" else "o"}
            x, ours, theirs = point["intensity"], point["fastconv"], point["torch"]
            axis.plot([x, x], [ours, theirs], color=shown["color"], linewidth=0.5, alpha=0.5)
            axis.plot(x, theirs, **shown, markersize=4, markerfacecolor="none", linestyle="none", markeredgewidth=0.7)
            axis.plot(x, ours, **shown, markersize=4, linestyle="none")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(direction, fontsize=10, loc="left")
        axis.set_xlabel("FLOP a byte of inputs and results", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("GFLOP/s", fontsize=8)
    axes[0].set_title(
        f"copy {limits['copy_gb_s']:.1f} GB/s, matmul {limits['matmul_gflop_s']:.0f} GFLOP/s", fontsize=8, loc="right"
    )
    groups = [group for group in COLOURS if any(point["group"] == group for point in found)]
    handles = [plt.Line2D([], [], color=COLOURS[group], marker="o", linestyle="none", label=group) for group in groups]
    for name, marker, face in (("fastconv", "o", "black"), ("torch", "o", "none"), ("NHWC", "s", "black")):
        handles.append(
            plt.Line2D([], [], color="black", marker=marker, markerfacecolor=face, linestyle="none", label=name)
        )
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=8)
    figure.supxlabel(f"{result['title']} · {result['date'][:10]}", fontsize=8, color="#555555")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
