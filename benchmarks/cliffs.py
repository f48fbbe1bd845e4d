"""Looks for cliffs: sizes that cost much more a multiply-add than their neighbours, and first calls of a new shape that
cost much more than the next ones.

    python benchmarks/cliffs.py [--device cpu|cuda] [--dtype float32] [--layout nchw|nhwc]

Backward and forward are timed together. The bound is 1.5× between neighbours; the exit code is 1 beyond it.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import machine  # noqa: E402
from layers import LAYERS  # noqa: E402
from measure import LIBRARIES, Tensors, time_in_turn, timer  # noqa: E402

BASES = ("resnet.3x3.28", "alexnet.conv3", "resnet.reduce56", "mobilenet.dw56")
BOUND = 1.5
NEW_SHAPES = 8


def neighbours(layer):
    """The layer, and those with one image, channel or filter more or fewer. A depthwise layer stays depthwise."""
    yield "", layer
    for step in (-1, 1):
        yield f"N{step:+}", replace(layer, batches=tuple(n + step for n in layer.batches))
        if layer.groups == layer.C:
            yield f"C{step:+}", replace(layer, C=layer.C + step, K=layer.K + step, groups=layer.groups + step)
        else:
            yield f"C{step:+}", replace(layer, C=layer.C + step)
            yield f"K{step:+}", replace(layer, K=layer.K + step)


def steps(layer, device, dtype, layout):
    """{library: a call of forward and backward}."""
    tensors = Tensors.random(layer, device, dtype).to(layout=layout.upper())
    return {name: lambda ops=ops: tensors.backward(tensors.forward(layer, ops)) for name, ops in LIBRARIES.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=machine.DTYPES, default="float32")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw")
    options = parser.parse_args()
    device = machine.choose_device(options.device)
    machine.set_precision(options.dtype)
    print(machine.title(machine.describe(device)))
    arguments, milliseconds = (device, options.dtype, options.layout), timer(device)
    worst = 0.0
    for base in (layer for layer in LAYERS if layer.name in BASES):
        calls, work = {}, {}
        for name, layer in neighbours(base):
            work[name] = layer.multiply_adds(layer.batch(device))
            calls |= {(name, library): call for library, call in steps(layer, *arguments).items()}
        times = time_in_turn(calls, milliseconds, 5.0, (5, 100))
        cost = {(name, library): timing.median / work[name] for (name, library), timing in times.items()}
        for library in LIBRARIES:
            relative = {name: cost[name, library] / cost["", library] for name in work if name}
            print(f"{base.name:16} {library:9}" + "".join(f"  {name} {ratio:.2f}×" for name, ratio in relative.items()))
            if library == "fastconv":
                worst = max(worst, *relative.values())

    firsts = {library: [] for library in LIBRARIES}
    base = next(layer for layer in LAYERS if layer.name == BASES[0])
    for i in range(NEW_SHAPES):
        layer = replace(base, H=base.H + 1 + i)
        for library, call in steps(layer, *arguments).items():
            first, *later = (milliseconds(call) for _ in range(6))
            firsts[library].append(first / sorted(later)[2])
    for library, ratios in firsts.items():
        print(f"first call of a shape, {library}: {sorted(ratios)[NEW_SHAPES // 2]:.2f}× of its next ones")
    print(f"fastconv's worst neighbour: {worst:.2f}×, bound {BOUND}×")
    return 1 if worst > BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
