"""Every instantiation of a CUDA kernel runs emulated, on cases whose results are compared with float64.

A kernel is a function that csrc/cuda declares __global__; an instantiation is named like "gemm_kernel<float, 64>".
"""

import ctypes
import re
import subprocess

import pytest
import test_avg_pool2d
import test_batch_norm
import test_conv2d
import test_conv2d_implicit_gemm
import test_conv2d_mma
import test_max_pool2d
import torch
from conftest import ROOT, emulated_library_path
from layouts import lay_out

import fastconv

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LOGS = ROOT / "build" / "ninja" / "cuda"
DECLARATION = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(")
SCOPES = ("void ", "(anonymous namespace)::", "fastconv::cuda::", "fastconv::", "(Window)", "(Direction)", "(Act)")
ENTRY = re.compile(r"Compiling entry function '(\w+)'")  # of ptxas


def output_of(*command, text=None):
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.splitlines()


def declared_kernels():
    """{name: the stem of its file}"""
    stems = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        source = path.read_text()
        found = DECLARATION.findall(source)
        assert len(found) == source.count("__global__ "), f"a kernel in {path.name} is declared in another way"
        stems.update(dict.fromkeys(found, path.stem))
    return stems


def instantiations(symbols, kernels):
    """[(index of the symbol, name)] of the symbols that are instantiations of these kernels."""
    found = []
    for index, symbol in enumerate(output_of("c++filt", text="\n".join(symbols))):
        for scope in SCOPES:
            symbol = symbol.replace(scope, "")
        match = re.fullmatch(r"((\w+)(?:<.*?>)?)\(.*\)", symbol)
        if match and match[2] in kernels and "lambda" not in symbol:
            found.append((index, match[1]))
    return found


def emulated_instantiations(library, kernels):
    """{name: offset in the library}"""
    lines = [line.split() for line in output_of("nm", str(library))]
    symbols = [line for line in lines if len(line) == 3 and line[2].startswith("_Z")]
    found = instantiations([name for _, _, name in symbols], kernels)
    return {name: int(symbols[index][0], 16) for index, name in found}


def check_conv2d(backend, dtype, layout):
    all_at_once, depthwise = test_conv2d.CASES[5], [c for c in test_conv2d.CASES if c.name.startswith("depthwise")]
    many_filters = test_conv2d.MEDIUM_CASES[1]
    for algo in ("direct_naive", "direct", "im2col"):
        test_conv2d.check(backend, all_at_once, dtype, layout, algo)
    if dtype in (torch.float32, torch.float64):
        for algo in test_conv2d.IMPLICIT:
            test_conv2d.check(backend, all_at_once, dtype, layout, algo)
        for case in (test_conv2d_implicit_gemm.TILE_CASES[0], test_conv2d_implicit_gemm.TILE_CASES[2]):  # both tiles
            test_conv2d.check(backend, case, dtype, layout, "implicit_gemm")
    test_conv2d.check(backend, many_filters, dtype, layout, "im2col")
    for case in depthwise:
        test_conv2d.check(backend, case, dtype, layout, "depthwise")


def check_conv2d_mma(backend, dtype, layout):
    # Small tiles, padded channels, and the other tiles, in every direction.
    small, padded = test_conv2d_mma.VECTOR_CASES[0], test_conv2d_mma.PIECE_CASES[4]
    for case in (small, padded, *test_conv2d_mma.TILE_CASES):
        if dtype is torch.float32:
            test_conv2d_mma.check_tf32(backend, case, layout)
            test_conv2d_mma.check_float32(backend, case, layout)
        else:
            test_conv2d.check(backend, case, dtype, layout, "mma")


def check_avg_pool2d(backend, dtype, layout):
    for case in test_avg_pool2d.CASES:
        test_avg_pool2d.check(backend, case, lay_out(torch.randn(case.x).to(dtype), layout))


def check_max_pool2d(backend, dtype, layout):
    for case in test_max_pool2d.CASES[:9] + test_max_pool2d.CASES[17:]:
        x = lay_out(torch.randn(case.x).to(dtype), layout)
        test_max_pool2d.check_values(backend, x, case.window)
        test_max_pool2d.check_gradient(backend, x, case.window)
        test_max_pool2d.check_double_backward(backend, x, case.window)


def check_batch_norm(backend, dtype, layout):
    for size in (*test_batch_norm.IMAGES[5:], (4, 3, 5, 7), (3, 2, 91, 127)):
        x = torch.randn(size).to(dtype)
        test_batch_norm.check(backend, x, layout)
        for with_residual in (False, True):
            test_batch_norm.check_act(backend, x, layout, with_residual=with_residual)


# conv2d is last: it has the largest blocks, and ThreadSanitizer's clocks stay as long as the largest block so far.
FAMILIES = {
    "avg_pool2d": check_avg_pool2d,
    "max_pool2d": check_max_pool2d,
    "batch_norm": check_batch_norm,
    "conv2d_mma": check_conv2d_mma,
    "conv2d": check_conv2d,
}
SHARED = {"gemm": "conv2d", "ordered_sum": "conv2d", "pad_channels": "conv2d_mma", "transpose": "conv2d_mma"}


def family_of(stem):
    return SHARED.get(stem) or max((family for family in FAMILIES if stem.startswith(family)), key=len)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_every_instantiation_runs(backend, family, emulated_library):
    launches = emulated_library.fastconv_emulation_launches
    launches.restype, launches.argtypes = ctypes.c_uint64, [ctypes.c_uint64]
    kernels = [kernel for kernel, stem in declared_kernels().items() if family_of(stem) == family]
    offsets = emulated_instantiations(emulated_library._name, kernels)
    before = {name: launches(offset) for name, offset in offsets.items()}
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            torch.manual_seed(0)  # what one draws does not depend on the others
            FAMILIES[family](backend, dtype, layout)
    never = sorted(name for name, offset in offsets.items() if launches(offset) == before[name])
    assert offsets and not never, f"{len(never)} of {len(offsets)} instantiations never ran: {'; '.join(never)}"


def test_nvcc_compiled_the_same_instantiations():
    logs = [LOGS / f"{path.stem}.o.log" for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    if not fastconv.planning._introspection().built_with_cuda or not all(log.exists() for log in logs):
        pytest.skip("the CUDA kernels were not compiled by nvcc")
    symbols = sorted({symbol for log in logs for symbol in ENTRY.findall(log.read_text())})
    kernels = declared_kernels()
    compiled = instantiations(symbols, kernels)
    assert len(compiled) == len(symbols), "nvcc compiled a kernel that is not declared in csrc/cuda"
    assert {name for _, name in compiled} == set(emulated_instantiations(emulated_library_path(), kernels))
