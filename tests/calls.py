"""Whole calls of conv2d, max_pool2d and batch_norm, made up by hypothesis: every argument in every form torch takes,
and, in about a fourth of the calls, something that torch refuses.

A tensor is drawn as a Drawn: its size, dtype, layout and whether it needs a gradient; make() gives the same tensor each
time, so that one library's call cannot change the input of the other's.
"""

from dataclasses import dataclass, replace

import numpy
import torch
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out

DOMAIN = {
    "sizes": "0 to 3 images or no batch dimension; 0 to 3 channels a group, 1 to 5 filters a group, 1 to 3 groups; "
    "kernels of 1 to 4, images from the smallest they fit to 8 more, H and W apart; batch_norm also "
    "(N, C), (N, C, L), 5 and 6 dimensions and (C,)",
    "pairs": "stride, padding, dilation, kernel_size as an int, a list, a tuple or a torch.Size of one or two "
    "numbers, a NumPy int, a tensor of one element; arguments by position or by keyword, left out or given",
    "padding": "0 to 4, 'valid', 'same' (also with a stride), other strings; of pooling to over half of the kernel",
    "dtypes": "float32, float64, bfloat16, float16; mixed, float32 parameters for low precision; int64, complex64",
    "layouts": "contiguous, channels_last, transposed, outermost dimension innermost, every second element, expanded, "
    "overlapping windows, a neg view, a ZeroTensor; of each tensor and of the upstream gradient",
    "algo": "None, 'direct', 'im2col'",
    "values": "normal; for pooling also ties, infinities and NaN; for batch_norm also far from 0",
    "gradients": "of any subset of input, weight and bias, or of none",
    "statistics": "given, None or only one of them; training or not; momentum 0 to 1; eps 1e-5 to 1, 0 and below",
    "faults": "zero, negative and huge (2^31 to 2^63 − 1) numbers, three or no numbers for a pair, a float, None, a "
    "string; kernels larger than the image; wrong channels, groups, ranks, lengths and dtypes; no tensor for a tensor",
}

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FILLS = ("normal", "ties", "infinities", "nan", "offset")
HUGE = (2**31, 2**40, 2**62, 2**63 - 1)


@dataclass(frozen=True)
class Drawn:
    size: tuple
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    requires_grad: bool = False
    fill: str = "normal"
    seed: int = 0

    def make(self):
        generator = torch.Generator().manual_seed(self.seed)
        tensor = lay_out(_values(self.size, self.fill, generator).to(self.dtype), self.layout)
        return tensor.requires_grad_() if self.requires_grad and self.dtype.is_floating_point else tensor


def _values(size, fill, generator):
    if fill == "ties":
        return torch.randint(0, 3, size, generator=generator).double()
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    if fill == "offset":
        return values + 30
    if fill == "positive":
        return values.abs() + 0.1
    if fill in ("infinities", "nan"):
        special = torch.tensor([torch.inf, -torch.inf, -torch.inf, 0.0 if fill == "infinities" else torch.nan])
        chosen = special[torch.randint(0, 4, size, generator=generator)].double()
        return torch.where(torch.rand(size, generator=generator) < 0.7, chosen, values)
    return values


LAYOUT = st.sampled_from(["contiguous"] * 4 + ["channels_last"] * 4 + list(LAYOUTS[2:]))
SEED = st.integers(0, 2**20)


@dataclass(frozen=True)
class Call:
    """One call. `exact` are its numbers as pairs, None where one is none or wrong;
    `fault` is what is wrong with the tensors; `dy` is the upstream gradient's layout."""

    function: str
    tensors: dict
    options: dict
    by_keyword: bool
    dy: str
    exact: dict
    fault: str = ""
    algo: str | None = None  # fastconv's own keyword

    def arguments(self):
        """Positional and keyword arguments with fresh tensors, and these tensors by name."""
        tensors = {k: t.make() if isinstance(t, Drawn) else t for k, t in self.tensors.items()}
        if self.by_keyword:
            return (), {**tensors, **self.options}, tensors
        positional = list(tensors.values()) + [v for v in self.options.values()]
        return tuple(positional), {}, tensors

    def numbers(self):
        """Every integer among the options."""
        for value in self.options.values():
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(number, int):
                    yield number

    def is_huge(self):
        """Whether torch computes with numbers that overflow: it cannot be asked."""
        return any(abs(number) >= 2**31 for number in self.numbers())


@st.composite
def spelled(draw, pair):
    """One of the ways to write a pair."""
    forms = ["tuple", "list", "size"]
    if pair[0] == pair[1]:
        forms += ["int"] * 4 + ["one", "one in a list", "numpy", "tensor"]
    form = draw(st.sampled_from(forms))
    return {
        "tuple": pair, "list": list(pair), "size": torch.Size(pair), "int": pair[0], "one": pair[:1],
        "one in a list": [pair[0]], "numpy": numpy.int64(pair[0]), "tensor": torch.tensor(pair[0]),
    }[form]  # fmt: skip


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


def chance(draw, one_in):
    return draw(st.integers(1, one_in)) == one_in


def wrong_pair(draw, name, pair):
    """What is given in place of a pair: a wrong number in it, or no pair at all."""
    wrong = draw(
        st.sampled_from([-1, *HUGE, "three", 1.5, None, "a"] + {"padding": [], "stride": [0]}.get(name, [0, "none"]))
    )
    if wrong == "three":
        return (*pair, 1)
    if wrong == "none":
        return ()
    if wrong in (0, -1, *HUGE):
        return draw(st.sampled_from([wrong, (wrong, pair[1]), [pair[0], wrong]]))
    return wrong


def draw_tensor(draw, size, dtype, fills=("normal",)):
    return Drawn(tuple(size), dtype, draw(LAYOUT), draw(st.booleans()), draw(st.sampled_from(fills)), draw(SEED))


def draw_dtype(draw):
    return draw(st.sampled_from([torch.float32] * 5 + list(FLOATING[1:]) + [torch.bfloat16]))


def spell_all(draw, exact, defaults):
    """The pairs as they are written, in order; those that have their default may be left out."""
    options = {}
    for name, pair in exact.items():
        options[name] = draw(spelled(pair)) if isinstance(pair, tuple) else pair
    for name in reversed(list(defaults)):
        if exact[name] != defaults[name] or draw(st.booleans()):
            break
        del options[name]
    return options


CONV2D_DEFAULTS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


@st.composite
def conv2d_calls(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_group, filters = draw(st.sampled_from([1, 1, 2, 2, 3, 3, 0])), draw(st.sampled_from([1, 1, 2, 2, 3, 5]))
    kernel, dilation = draw(pairs(1, 4)), draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
    exact = {
        "stride": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1), (4, 3)])),
        "padding": draw(pairs(0, 4)),
        "dilation": dilation,
        "groups": groups,
    }
    if chance(draw, 6):
        exact["padding"] = draw(st.sampled_from(["same", "valid"]))
        if exact["padding"] == "same" and not chance(draw, 6):
            exact["stride"] = (1, 1)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if not isinstance(exact["padding"], str):
        reach = [r - 2 * p for r, p in zip(reach, exact["padding"], strict=True)]
    image = [draw(st.integers(max(1, r), max(1, r) + 8)) for r in reach]
    images = draw(st.sampled_from([None, 0, 1, 1, 2, 2, 3]))
    sizes = {
        "input": ([] if images is None else [images]) + [groups * per_group, *image],
        "weight": [groups * filters, per_group, *kernel],
        "bias": [groups * filters],
    }
    dtype = draw_dtype(draw)
    dtypes = dict.fromkeys(sizes, dtype)
    fault = draw(
        st.sampled_from([""] * 24 + ["channels", "filters", "rank", "length", "image", "dtype", "kind", "none"])
    )
    which = draw(st.sampled_from(list(sizes)))
    if fault == "channels":
        sizes["input"][-3] += draw(st.sampled_from([-1, 1]))
        sizes["input"][-3] = max(sizes["input"][-3], 0)
    elif fault == "filters":
        sizes["weight"][0] = draw(st.integers(0, groups * filters))
    elif fault == "rank":
        sizes[which] = draw(st.sampled_from([sizes[which][1:], [1, 2, *sizes[which]]]))
    elif fault == "length":
        sizes["bias"] = [sizes["bias"][0] + 1]
    elif fault == "image":
        sizes["input"][draw(st.sampled_from([-1, -2]))] = draw(st.integers(0, 2))
    elif fault == "dtype":
        dtypes[which] = draw(st.sampled_from([*FLOATING, torch.int64]))
    elif fault == "kind":
        dtypes = dict.fromkeys(sizes, draw(st.sampled_from([torch.int64, torch.complex64])))
    tensors = {name: draw_tensor(draw, size, dtypes[name]) for name, size in sizes.items()}
    if draw(st.booleans()) and which != "bias":
        tensors["bias"] = None
    if fault == "none":
        tensors[which] = draw(st.sampled_from([None, (), 1.0]))
    options = spell_all(draw, exact, CONV2D_DEFAULTS)
    if chance(draw, 8) and options:
        name = draw(st.sampled_from(list(options)))
        options[name] = wrong_pair(draw, name, exact[name] if isinstance(exact[name], tuple) else (1, 1))
        if name == "groups" and isinstance(options[name], (tuple, list)):
            options[name] = draw(st.sampled_from([0, -1, 7, *HUGE]))
        exact = None
    elif chance(draw, 40) and "padding" in options:
        options["padding"], exact = draw(st.sampled_from(["", "full", "Same"])), None
    algo = (
        draw(st.sampled_from([None, None, None, "direct", "im2col"]))
        if fault not in ("kind", "dtype", "none")
        else None
    )
    return Call("conv2d", tensors, options, draw(st.booleans()), draw(LAYOUT), exact, fault, algo)


POOL_DEFAULTS = {"stride": None, "padding": (0, 0), "dilation": (1, 1), "ceil_mode": False, "return_indices": False}


@st.composite
def max_pool2d_calls(draw):
    kernel, dilation = draw(pairs(1, 4)), draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, r // 2 + (1 if chance(draw, 16) else 0))) for r in reach)
    exact = {
        "kernel_size": kernel,
        "stride": draw(st.sampled_from([None, (1, 1), (2, 2), (1, 2), (3, 1), (4, 3)])),
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": draw(st.booleans()),
        "return_indices": draw(st.booleans()),
    }
    smallest = [max(1, r - 2 * p - (1 if chance(draw, 16) else 0)) for r, p in zip(reach, padding, strict=True)]
    size = [draw(st.integers(n, n + 8)) for n in smallest]
    images = draw(st.sampled_from([None, 0, 1, 1, 2, 2, 3]))
    size = ([] if images is None else [images]) + [draw(st.sampled_from([1, 2, 3, 5])), *size]
    fault = draw(st.sampled_from([""] * 24 + ["rank", "empty", "kind", "none"]))
    dtype = draw_dtype(draw)
    if fault == "rank":
        size = draw(st.sampled_from([size[1:], [1, 2, *size]]))
    elif fault == "empty":
        size[draw(st.integers(0, len(size) - 1))] = 0
    elif fault == "kind":
        dtype = draw(st.sampled_from([torch.int64, torch.complex64]))
    tensor = draw_tensor(draw, size, dtype, FILLS[:4])
    options = spell_all(draw, exact, POOL_DEFAULTS)
    if exact["stride"] is None and "stride" in options:
        options["stride"] = draw(st.sampled_from([None, [], ()]))
    if chance(draw, 8):
        name = draw(
            st.sampled_from([name for name in ("kernel_size", "stride", "padding", "dilation") if name in options])
        )
        options[name] = wrong_pair(draw, name, exact[name] or kernel)
        # No stride is the default one.
        exact = {**exact, "stride": None} if (name, options[name]) == ("stride", None) else None
    tensors = {"input": tensor if fault != "none" else draw(st.sampled_from([None, (), 1.0]))}
    return Call("max_pool2d", tensors, options, draw(st.booleans()), draw(LAYOUT), exact, fault)


BATCH_NORM_DEFAULTS = {"training": False, "momentum": 0.1, "eps": 1e-5}


@st.composite
def batch_norm_calls(draw):
    channels = draw(st.sampled_from([1, 2, 3, 5, 0]))
    rest = draw(st.sampled_from([(5, 4), (5, 4), (1, 1), (2, 3), (7, 1), (0, 3), (), (6,), (2, 3, 2), (2, 1, 2, 2)]))
    size = [draw(st.sampled_from([0, 1, 2, 2, 3, 3])), channels, *rest]
    dtype = draw_dtype(draw)
    parameters = torch.float32 if dtype in FLOATING[2:] and draw(st.booleans()) else dtype
    exact = {
        "training": draw(st.booleans()),
        "momentum": draw(st.sampled_from([0.1, 0.1, 0.0, 0.5, 1.0, 1])),
        "eps": draw(st.sampled_from([1e-5, 1e-5, 1e-3, 1])),
    }
    names = ("running_mean", "running_var", "weight", "bias")
    lengths, dtypes = dict.fromkeys(names, [channels]), dict.fromkeys(names, parameters)
    fault = draw(st.sampled_from([""] * 24 + ["rank", "length", "dtype", "kind", "none", "half", "grad", "shape"]))
    which = draw(st.sampled_from(names))
    if fault == "rank":
        size = size[1:2]
    elif fault == "length":
        lengths[which] = [channels + draw(st.sampled_from([-1, 1]))] if channels else [1]
    elif fault == "shape":
        lengths[names[draw(st.integers(0, 1))]] = [1, channels]
    elif fault == "dtype":
        dtypes[which] = draw(st.sampled_from([*FLOATING, torch.int64]))
    elif fault == "kind":
        dtype = draw(st.sampled_from([torch.int64, torch.complex64]))
        dtypes = dict.fromkeys(names, dtype)
    tensors = {"input": draw_tensor(draw, size, dtype, ("normal", "offset"))}
    for name in names:
        tensors[name] = draw_tensor(draw, lengths[name], dtypes[name], ("positive",) if "var" in name else ("normal",))
        if "running" in name:  # they are written to: elements that share memory would be a race, and
            # torch's own fallback asserts for ops that write to neg views
            layout = draw(st.sampled_from(["contiguous", "slices"]))
            tensors[name] = replace(tensors[name], layout=layout, requires_grad=fault == "grad" and name == which)
        elif draw(st.booleans()):
            tensors[name] = None
    if exact["training"] and draw(st.booleans()) or chance(draw, 16):
        tensors["running_mean"] = tensors["running_var"] = None
    if fault == "half":
        tensors[which] = None
    elif fault == "none":
        tensors[draw(st.sampled_from(["input", which]))] = draw(st.sampled_from([None, (), 1.0]))
    options = spell_all(draw, exact, BATCH_NORM_DEFAULTS)
    if chance(draw, 8) and options:
        name = draw(st.sampled_from(list(options)))
        wrong = [-1.0, None] + ([0, 0.0] if exact["training"] else []) if name == "eps" else [None, "a"]
        options[name] = draw(st.sampled_from(wrong))
        exact = None
    return Call("batch_norm", tensors, options, draw(st.booleans()), draw(LAYOUT), exact, fault)


CALLS = {"conv2d": conv2d_calls(), "max_pool2d": max_pool2d_calls(), "batch_norm": batch_norm_calls()}
