"""How much memory a call takes at its peak beyond what was there and what it returns: workspace, copies, and what
forward keeps for backward besides its input.

On a GPU torch's allocator says so; whatever cuDNN asks for goes through it. On a CPU libraries allocate behind torch's
back, so that the peak is the process's own (VmHWM of Linux), in a process that does nothing else, where every block of
64 KiB or more is mapped anew and given back at once. The kernel counts pages in batches: half a MiB is nothing.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import layers  # noqa: E402
import torch  # noqa: E402
from measure import LIBRARIES, Tensors  # noqa: E402
from report import console, plain_table  # noqa: E402

import fastconv  # noqa: E402

TITLE = "memory: MiB at the peak of a call, beyond its inputs and results"
HEADER = ("layer, layout", "pass", "results", "fastconv", "its plan states", "torch")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PR_SET_THP_DISABLE = 41
SMALLEST_MAPPED = 64 * 1024


def peak_is_readable():
    try:
        reset_peak()
        return resident("VmHWM") > 0
    except (OSError, KeyError):
        return False


def map_every_block():
    """From now on malloc maps each block of 64 KiB or more, in small pages, and unmaps it when it is freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, SMALLEST_MAPPED)
    libc.mallopt(M_TRIM_THRESHOLD, SMALLEST_MAPPED)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def resident(name):
    """VmRSS or VmHWM of this process, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(call, device):
    """(bytes that the call took at its peak beyond what was there before, its result)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    reset_peak()
    before = resident("VmRSS")
    result = call()
    return resident("VmHWM") - before, result


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def plan_bytes(layer, tensors, direction):
    """The workspace that the plans of a convolution state, of its gradients the larger; None of other layers."""
    if not isinstance(layer, layers.Conv):
        return None
    threads = torch.get_num_threads() if tensors.x.device.type == "cpu" else 0
    found = 0
    for part in ("fprop",) if direction == layers.FORWARD else ("dgrad", "wgrad"):
        weight = tensors.parameters[0]
        plan = fastconv.plan(tensors.x, weight, layer.stride, layer.pad, 1, layer.groups, direction=part)
        found = max(found, plan.workspace_bytes + threads * plan.scratch_bytes)
    return found


def measure_library(ops, layer, tensors, device):
    """[(direction, bytes of the results, bytes of the peak beyond them)] of one library."""
    for _ in range(2):  # once more, now that the library has made what it keeps
        forward, y = peak_bytes(lambda: tensors.forward(layer, ops), device)
        backward, gradients = peak_bytes(lambda y=y: tensors.backward(y), device)
        parts = zip(layers.PASSES, ([y], gradients), (forward, backward), strict=True)
        found = [(name, size(results), max(0, peak - size(results))) for name, results, peak in parts]
        del y, gradients
    return found


def measure_here(chosen, layout, dtype, device):
    rows = []
    for layer in chosen:
        gc.collect()
        tensors = Tensors.random(layer, device, dtype).to(layout=layout.upper())
        found = {library: measure_library(ops, layer, tensors, device) for library, ops in LIBRARIES.items()}
        for (direction, results, ours), (_, _, theirs) in zip(found["fastconv"], found["torch"], strict=True):
            rows.append({
                "layer": layer.name, "layout": layers.layouts(layer, layout)[0], "direction": direction,
                "results_bytes": results, "fastconv_bytes": ours, "torch_bytes": theirs,
                "plan_bytes": plan_bytes(layer, tensors, direction),
            })  # fmt: skip
    return rows


def measure_memory(chosen, layout, dtype, device):
    """A row for each layer and direction: bytes of the results, and of either library's peak beyond them. None of them
    on a CPU whose system does not tell a process's peak."""
    if device == "cuda":
        return measure_here(chosen, layout, dtype, device)
    if not peak_is_readable():
        return []
    command = [sys.executable, __file__, "--json", "--layout", layout, "--dtype", dtype, "--threads",
               str(torch.get_num_threads()), *(layer.name for layer in chosen)]  # fmt: skip
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def lines(rows):
    def mib(count):
        return "–" if count is None else f"{count / 2**20:.1f}"

    keys = ("results_bytes", "fastconv_bytes", "plan_bytes", "torch_bytes")
    return [[f"{row['layer']} {row['layout']}", row["direction"], *(mib(row[key]) for key in keys)] for row in rows]


def main():
    parser = argparse.ArgumentParser(description="Measures the memory of a call on a CPU.")
    parser.add_argument("names", nargs="*", help="of layers; default: those of --quick")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = options.names or layers.QUICK
    map_every_block()
    rows = measure_here([layer for layer in layers.LAYERS if layer.name in names], options.layout, options.dtype, "cpu")
    if options.json:
        print(json.dumps(rows))
    else:
        console().print(plain_table(TITLE, HEADER, lines(rows)))


if __name__ == "__main__":
    main()
