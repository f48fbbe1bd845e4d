"""Writes what the networks cost into docs/lectures.md, between <!-- benchmark:lectures --> and its end.

    python benchmarks/costs.py             # prints the two tables
    python benchmarks/costs.py --write     # and writes them

Nothing is measured: fastconv.summary counts. One table has the figures that the lectures print beside what their own
layers give, the other every network.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import networks  # noqa: E402
import torch  # noqa: E402
from report import markdown_table, write_between  # noqa: E402
from torch import nn  # noqa: E402

import fastconv  # noqa: E402

PAGE = ROOT / "docs" / "lectures.md"


def cost(build, size, **arguments):
    with torch.device("meta"):
        return fastconv.cost(build(**arguments), size)


def connections(model, size):
    """As LeCun et al. (1998) count them: each product and each bias at each place, and of a subsampling the four
    elements it adds up, whose sum is multiplied once."""
    total = 0
    for row in fastconv.summary(model, size):
        places = torch.Size(row.output_size).numel()
        if row.layer == "AvgPool2d":
            total += 4 * places
        elif row.multiply_adds > places:
            total += row.multiply_adds + (places if row.biases else 0)
        elif row.biases:  # a coefficient and a bias for each map
            total += places
    return total


def printed_and_computed():
    """[(what, as printed, computed, how to read it)] where the lectures print a total."""
    alexnet, grouped = (cost(networks.AlexNet, (3, 227, 227), groups=groups) for groups in (1, 2))
    lenet, lenet1998 = cost(networks.LeNet5, (1, 28, 28)), cost(networks.LeNet1998, (1, 32, 32))
    codes = 84 * 10  # of the paper's last layer, which are not learnt
    naive = cost(networks.NaiveInception, (256, 28, 28), channels=256, f1=128, f3=192, f5=96)
    bottlenecks = {"channels": 256, "f1": 128, "r3": 64, "f3": 192, "r5": 64, "f5": 96, "pool": 64}
    bottleneck = cost(networks.Inception, (256, 28, 28), **bottlenecks)
    middle = cost(nn.Conv2d, (64, 28, 28), in_channels=64, out_channels=192, kernel_size=3, padding=1)
    googlenet, smaller = (cost(networks.GoogLeNet, (3, 224, 224), ceil_mode=ceil_mode) for ceil_mode in (True, False))
    with torch.device("meta"):
        lenet_connections = connections(networks.LeNet1998(), (1, 32, 32))
    return [
        ("LeNet-5, parameters", "60k", lenet1998.parameters - codes,
         "of the paper of 1998, with biases, without its fixed output codes"),
        ("LeNet-5, operations", "341k", lenet_connections,
         "the paper's connections: products, biases and the elements that are averaged"),
        ("LeNet-5, operations", "341k", lenet1998.multiply_adds, "the same network's multiply-adds"),
        ("LeNet-5 as drawn, parameters", "", lenet.parameters, "with biases; 20 and 50 filters, 500 units"),
        ("LeNet-5 as drawn, operations", "", lenet.multiply_adds, "multiply-adds"),
        ("AlexNet, parameters", "61M", alexnet.parameters, "with biases, of the table as printed"),
        ("AlexNet, parameters", "61M", grouped.parameters, "with biases, two groups in CONV2, 4 and 5"),
        ("AlexNet, operations", "724M", alexnet.multiply_adds, "multiply-adds, of the table as printed"),
        ("AlexNet, operations", "724M", grouped.multiply_adds, "multiply-adds, two groups in CONV2, 4 and 5"),
        ("Inception, naive, operations", "854M", naive.multiply_adds, "multiply-adds"),
        ("Inception with bottlenecks, operations", "358M", bottleneck.multiply_adds,
         "multiply-adds, the sum of the slide's own lines"),
        ("Inception with bottlenecks, operations", "358M", bottleneck.multiply_adds + middle.multiply_adds,
         "the same with the line of the 3×3 added twice"),
        ("GoogLeNet, parameters", "7.0M", googlenet.parameters, "with biases, without the auxiliary classifiers"),
        ("GoogLeNet, operations", "1.43G", googlenet.multiply_adds, "multiply-adds, of the paper's table"),
        ("GoogLeNet, operations", "1.43G", smaller.multiply_adds, "the same where pools round sizes down"),
    ]  # fmt: skip


def every_network():
    """{name: its total Cost} at its own size, one image."""
    return {name: cost(network.build, network.size) for name, network in networks.NETWORKS.items()}


def markdown():
    """Both tables."""
    printed = [[what, said or "–", f"{computed:,}", how] for what, said, computed, how in printed_and_computed()]
    lines = []
    for name, total in every_network().items():
        size = "×".join(map(str, total.input_size))
        numbers = (total.weights, total.biases, total.multiply_adds, total.least_bytes)
        sees = "×".join(map(str, total.receptive_field))
        lines.append([name, size, *(f"{n:,}" for n in numbers), f"{total.intensity:.1f}", sees])
    header = ["network", "image", "weights", "biases", "multiply-adds", "least bytes", "FLOP/byte", "receptive field"]
    return "\n\n".join([
        markdown_table(["", "printed", "computed", "what is counted"], printed),
        "One image in float32. Weights include the scales of BatchNorm, biases its shifts; least bytes are each layer's"
        " input, parameters and output once.",
        markdown_table(header, lines),
    ])  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    text = markdown()
    print(text)
    if options.write:
        write_between(PAGE, "lectures", text)


if __name__ == "__main__":
    main()
