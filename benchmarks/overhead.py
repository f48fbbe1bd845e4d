"""What a call costs besides its arithmetic: a convolution of 1×1×8×8 by a 3×3 filter, of hardly any.

    python benchmarks/overhead.py [--device cpu|cuda]

On a GPU this is the time until the call returns, not until it is done.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import machine  # noqa: E402
import torch  # noqa: E402
from measure import LIBRARIES, time_in_turn  # noqa: E402
from report import console, plain_table  # noqa: E402

TITLE = "overhead: a call at 1×1×8×8"
HEADER = ("", "fastconv µs", "torch µs", "fastconv / torch")
CALLS = 200  # a reading of the clock
CASES = ("no gradient", "forward", "forward and backward")


def calls(device):
    """{(case, library): a function that makes CALLS calls}."""
    x, w, b = (torch.randn(size, device=device) for size in ((1, 1, 8, 8), (1, 1, 3, 3), (1,)))
    dy = torch.randn(1, 1, 6, 6, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]

    def repeat(call):
        def run():
            for _ in range(CALLS):
                call()

        return run

    found = {}
    for name, ops in LIBRARIES.items():
        found["no gradient", name] = repeat(lambda ops=ops: ops.conv2d(x, w, b))
        found["forward", name] = repeat(lambda ops=ops: ops.conv2d(*leaves))
        found["forward and backward", name] = repeat(lambda ops=ops: ops.conv2d(*leaves).backward(dy))
    return found


def milliseconds(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure_overhead(device, seconds=3.0):
    """A row for each case: µs a call of both libraries, and fastconv's over torch's."""
    times = time_in_turn(calls(device), milliseconds, seconds, (5, 400))
    rows = []
    for case in CASES:
        ours, theirs = (1e3 * times[case, library].median / CALLS for library in ("fastconv", "torch"))
        rows.append({"case": case, "fastconv_us": ours, "torch_us": theirs, "ratio": ours / theirs})
    return rows


def lines(rows):
    return [
        [row["case"], f"{row['fastconv_us']:.1f}", f"{row['torch_us']:.1f}", f"{row['ratio']:.2f}×"] for row in rows
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    device = machine.choose_device(parser.parse_args().device)
    console().print(plain_table(TITLE, HEADER, lines(measure_overhead(device))))


if __name__ == "__main__":
    main()
