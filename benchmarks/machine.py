"""The machine: which device to measure, what it is called, and its own measured limits."""

import os
import platform
import shutil
import time

import torch

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def gpu_present():
    """Whether this machine has an NVIDIA GPU, whatever torch thinks of it."""
    return os.path.exists("/dev/nvidia0") or os.path.exists("/dev/dxg") or shutil.which("nvidia-smi") is not None


def why_no_cuda():
    """Why torch cannot use a GPU here."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "torch sees no CUDA device"


def choose_device(asked):
    """ "cpu" or "cuda"; SystemExit with the reason where a GPU is there (or asked for) that cannot be used."""
    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        build = fastconv_build()
        if build["cuda"] is False:
            raise SystemExit(
                "fastconv was built without CUDA kernels: rebuild it with FASTCONV_CUDA=1, or --device cpu"
            )
        return "cuda"
    if asked == "cuda" or gpu_present():
        what = "this machine has a GPU that torch cannot use" if gpu_present() else "no GPU"
        raise SystemExit(f"{what}: {why_no_cuda()}. To measure the CPU: --device cpu")
    return "cpu"


def fastconv_build():
    import fastconv

    try:
        from fastconv import _introspect
    except ImportError:
        return {"version": fastconv.__version__, "isa": "unknown", "cuda": None}
    return {"version": fastconv.__version__, "isa": _introspect.isa(), "cuda": _introspect.built_with_cuda}


def cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device):
    """What a reader of the figures must know of the machine."""
    machine = {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onednn": torch.backends.mkldnn.is_available(),
        "fastconv": fastconv_build(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "host": cpu_name(),
        }
    return machine


def title(machine):
    """The machine in one line."""
    build = machine["fastconv"]
    kernels = {True: "with CUDA kernels", False: "without CUDA kernels", None: "CUDA kernels unknown"}[build["cuda"]]
    if "cudnn" in machine:
        device = f"{machine['device']} (sm_{machine['capability'].replace('.', '')}), cuDNN {machine['cudnn']}"
    else:
        threads = machine["threads"]
        device = f"{machine['device']}, {threads} thread{'s' * (threads != 1)}"
    return f"{device} · torch {machine['torch']} · fastconv {build['version']} ({build['isa']}, {kernels})"


def best_seconds(call, device, repetitions):
    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    times = []
    for _ in range(repetitions):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_gflop_s(device, dtype, largest):
    """GFLOP/s of n×n matmuls: the best, over sizes that double until one takes a tenth of a second."""
    best, n, seconds = 0.0, 512, 0.0
    while n <= largest and seconds < 0.1:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = best_seconds(lambda a=a, b=b: a @ b, device, 5)
        best = max(best, 2 * n**3 / seconds / 1e9)
        n *= 2
    return best


def limits(device, dtype):
    """What torch itself reaches here at best: GB/s of a large copy (bytes read and written), GFLOP/s of a matmul. A CPU
    that is slower in a low precision than in float32 has the limit of float32."""
    elements = 2**30 if device == "cuda" else 2**28
    source = torch.ones(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), device, 10)
    matmul = matmul_gflop_s(device, DTYPES[dtype], 8192 if device == "cuda" else 2048)
    if device == "cpu" and DTYPES[dtype].itemsize == 2:
        matmul = max(matmul, matmul_gflop_s(device, torch.float32, 2048))
    return {"copy_gb_s": 2 * elements / seconds / 1e9, "matmul_gflop_s": matmul}


def set_precision(dtype):
    """TF32 in convolutions and matmuls exactly where --dtype tf32 asks for it."""
    precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision
