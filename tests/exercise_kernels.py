"""Runs every kernel over a few small shapes, forward and backward, and compares what comes out with float64.

    python tests/exercise_kernels.py [--device cuda] [--filter TEXT] [--json FILE]

It needs a minute where the tests need several: gpu_check.py runs it by itself, for a verdict on each kernel, and under
compute-sanitizer, which slows kernels down a hundredfold. The exit code is 1 if a result was wrong.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).resolve().parents[1])]

import test_batch_norm  # noqa: E402
import test_conv2d  # noqa: E402
import test_max_pool2d  # noqa: E402
from batch_norm_reference import batch_norm_reference  # noqa: E402
from conftest import Backend  # noqa: E402
from layouts import lay_out  # noqa: E402
from references import assert_close, conv2d_gradients, conv2d_reference, largest_error  # noqa: E402

import fastconv  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
CONV2D = ("padded", "all at once", "1x1 padded", "grouped", "depthwise", "odd channels", "full tiles", "strided stem",
          "medium depthwise")  # fmt: skip
CONV2D_CASES = [case for case in test_conv2d.CASES + test_conv2d.MEDIUM_CASES if case.name in CONV2D]
MAX_POOL2D = ("overlapping", "padded", "ceil, dilated", "odd channels", "two-byte offsets")
MAX_POOL2D_CASES = [case for case in test_max_pool2d.CASES if case.name in MAX_POOL2D]
BATCH_NORM_SIZES = [(4, 3, 5, 7), (2, 70, 3, 1), (2, 35, 9, 8), (300, 70), (3, 5, 700)]
PRODUCTS = {"fprop": ("y",), "dgrad": ("dx",), "wgrad": ("dw", "db")}


def complaint(check, *args):
    """What an assertion says, or None."""
    try:
        check(*args)
    except AssertionError as error:
        return str(error)
    return None


def conv2d(backend, dtype, layout):
    for case in CONV2D_CASES:
        tensors = test_conv2d.inputs_of(case, dtype, layout)
        expected = dict(zip(("y", "dx", "dw", "db"), conv2d_reference(*tensors, *case.config), strict=True))
        x, w, b, dy = map(backend.put, tensors)
        for algo in (None, *backend.algorithms):
            try:
                plans = [fastconv.plan(x, w, *case.config, direction=d, algo=algo) for d in PRODUCTS]
            except ValueError:
                continue  # this algorithm cannot do the case
            ours = functools.partial(_conv2d, case.config, algo)
            actual = dict(zip(expected, conv2d_gradients(ours, x, w, b, dy), strict=True))
            for plan in plans:
                for name in PRODUCTS[plan.direction]:
                    what = f"{case}, {layout}, algo {algo}: {name}"
                    found = complaint(assert_close, what, actual[name], expected[name])
                    yield f"conv2d {plan.direction}: {plan.kernel}", found


def _conv2d(config, algo, x, w, b):
    return fastconv.conv2d(x, w, b, *config, algo=algo)


def max_pool2d(backend, dtype, layout):
    for case in MAX_POOL2D_CASES:
        x = lay_out(torch.randn(case.x).to(dtype), layout)
        yield "max_pool2d forward", complaint(test_max_pool2d.check_values, backend, x, case.window)
        yield "max_pool2d backward", complaint(test_max_pool2d.check_gradient, backend, x, case.window)


def batch_norm(backend, dtype, layout):
    for size in BATCH_NORM_SIZES:
        for training in (True, False):
            weight, bias, mean = (torch.randn(size[1]).to(dtype) for _ in range(3))
            var = torch.rand(size[1]).to(dtype) + 0.1
            x, dy = (test_batch_norm.lay_out(torch.randn(size).to(dtype), layout) for _ in range(2))
            inputs = (x, weight, bias, mean, var, dy)
            expected = batch_norm_reference(*inputs, training, 0.3, 1e-3)
            actual = test_batch_norm.run(fastconv.batch_norm, *map(backend.put, inputs), training, 0.3, 1e-3)
            for name, result in actual.items():
                error, bound = largest_error(result, expected[name].value), expected[name].bound(result.dtype)
                found = None if error <= bound else f"{size}, {layout}: {name} is off by {error:.3g} of {bound:.3g}"
                direction = "backward" if name.startswith("d") else "forward"
                yield f"batch_norm {'training' if training else 'evaluation'} {direction}", found


def exercise(device, only=""):
    """{kernel: {dtype: {"checks": how many, "wrong": [what was]}}}, of the ops whose name contains `only`."""
    backend, results = Backend(device, device), {}
    for op in (conv2d, max_pool2d, batch_norm):
        for dtype in DTYPES if only in op.__name__ else ():
            torch.manual_seed(0)
            for layout in LAYOUTS:
                for kernel, found in op(backend, dtype, layout):
                    by_dtype = results.setdefault(kernel, {})
                    result = by_dtype.setdefault(str(dtype).removeprefix("torch."), {"checks": 0, "wrong": []})
                    result["checks"] += 1
                    result["wrong"] += [found] if found else []
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--filter", metavar="TEXT", default="", help="only the ops whose name contains it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where to write the results")
    options = parser.parse_args()
    results = exercise(options.device, options.filter)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [text for by_dtype in results.values() for result in by_dtype.values() for text in result["wrong"]]
    for kernel, by_dtype in sorted(results.items()):
        print(f"{kernel}: {sum(r['checks'] for r in by_dtype.values())} checks", end="")
        print("".join(f", {len(r['wrong'])} of {dtype} WRONG" for dtype, r in by_dtype.items() if r["wrong"]))
    print(*wrong, sep="\n")
    sys.exit(bool(wrong) or not results)


if __name__ == "__main__":
    main()
