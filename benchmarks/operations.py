"""Does the number of operations predict the time of an inference, as the lectures say? Correlations and a plot."""

import statistics
from math import log10

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"fastconv": "#2f6fa8", "fused": "#4f9d69", "torch": "#e08a2e", "torch.compile": "#8c6bb1"}
FEWEST = 3  # networks, for a correlation to say something
NAME_WIDTH = 0.03  # of the plot's


def points(rows, variant):
    """[(network, multiply-adds of an image, ms of an image)] of the inferences of a variant."""
    return [
        (row["layer"], row["multiply_adds"], row[variant]["median"] / row["batch"])
        for row in rows
        if row["direction"] == "inference" and row[variant]
    ]


def ranks(values):
    """The place of each value in their order, from 0; equal ones share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def correlate(found):
    """{networks, linear, log, rank: Pearson's r of operations and times, of their logarithms, of their ranks; spread:
    the largest ratio of two networks' times for an operation}. None of fewer than 3 networks."""
    if len(found) < FEWEST:
        return None
    operations, times = ([point[i] for point in found] for i in (1, 2))
    logs = [[log10(value) for value in values] for values in (operations, times)]
    costs = [time / count for _, count, time in found]
    return {
        "networks": len(found),
        "linear": statistics.correlation(operations, times),
        "log": statistics.correlation(*logs),
        "rank": statistics.correlation(ranks(operations), ranks(times)),
        "spread": max(costs) / min(costs),
    }


def write_names(axis, found):
    """The networks' names above the plot, each as near over its highest point as the others leave room."""
    highest = {}
    for name, count, time in found:
        highest[name] = max((count, time), highest.get(name, (0, 0.0)))
    ordered = sorted(highest, key=highest.get)
    low, high = map(log10, axis.get_xlim())
    places = [(log10(highest[name][0]) - low) / (high - low) for name in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + NAME_WIDTH)
    places[-1] = min(places[-1], 1.0)
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - NAME_WIDTH)
    for name, place in zip(ordered, places, strict=True):
        axis.annotate(
            name, highest[name], (place, 1.02), textcoords="axes fraction", rotation=60, fontsize=8, ha="left",
            va="bottom", arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "relpos": (0, 0)},
        )  # fmt: skip


def draw(result, path):
    """Writes the plot of a results file as PNG: a point for each network, a line of the mean time for an operation.
    Whether there was enough to draw."""
    series = {variant: points(result["rows"], variant) for variant in COLOURS}
    series = {variant: found for variant, found in series.items() if len(found) >= FEWEST}
    if not series:
        return False
    figure, axis = plt.subplots(figsize=(9, 6.5), layout="constrained")
    axis.set(xscale="log", yscale="log", xlabel="multiply-adds of an image", ylabel="ms an image, inference")
    for variant, found in series.items():
        operations, times = ([point[i] for point in found] for i in (1, 2))
        r = result["correlation"][variant]
        label = f"{variant}: r = {r['linear']:.2f}, of the logarithms {r['log']:.2f}"
        axis.scatter(operations, times, s=26, color=COLOURS[variant], label=label, zorder=3)
        cost = 10 ** statistics.fmean(log10(time / count) for _, count, time in found)
        ends = [min(operations), max(operations)]
        axis.plot(ends, [cost * end for end in ends], color=COLOURS[variant], linewidth=0.8, zorder=2)
    write_names(axis, [point for found in series.values() for point in found])
    axis.grid(which="major", color="#dddddd", linewidth=0.6, zorder=1)
    axis.legend(frameon=False, fontsize=9, loc="lower right", title="lines: the mean time for an operation")
    figure.supxlabel(f"{result['title']} · {result['date'][:10]}", fontsize=8, color="#555555")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
