"""cost() and summary(): what a layer or a whole model costs, counted on meta tensors, which hold no values.

An operation is one multiply-add, products with padding included. Pooling, normalization and activations count none.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = tuple(getattr(nn, f"Adaptive{kind}Pool{n}d") for kind in ("Max", "Avg") for n in (1, 2, 3))
_MOVE_NOTHING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)  # where they are evaluated
_POOL_FUNCTIONS = {f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)}


@dataclass(frozen=True)
class Cost:
    """What one call of a layer costs, or of a whole model.

    name, layer: its dotted name in the model, and its class.
    input_size, output_size: with the batch if the size that was asked for had it.
    weights, biases: parameters, counted apart; of BatchNorm its scales and shifts.
    multiply_adds: the lectures' "operations".
    least_bytes: each input, parameter and running statistic read once, each output written once.
    receptive_field: rows and columns of the model's input that one element of the output depends on, were there no
        border. Where branches meet it is the largest.
    """

    name: str
    layer: str
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    weights: int
    biases: int
    multiply_adds: int
    least_bytes: int
    receptive_field: tuple[int, ...]

    @property
    def parameters(self):
        """Weights and biases."""
        return self.weights + self.biases

    @property
    def intensity(self):
        """Floating-point operations, two a multiply-add, for each of the least bytes."""
        return 2 * self.multiply_adds / self.least_bytes if self.least_bytes else 0.0


class Summary(list):
    """A Cost for each call of a layer, in the order of the calls. Printing it gives a table.

    total: the Cost of the whole model. Its parameters are counted once, however often a layer is called; its
        multiply-adds are also those of functions that are called outside of the layers.
    """

    def __init__(self, costs, total):
        super().__init__(costs)
        self.total = total

    def __str__(self):
        header = ("", "layer", "output", "weights", "biases", "multiply-adds", "least bytes", "sees", "FLOP/byte")
        table = [header, *map(_cells, self)]
        if outside := self.total.multiply_adds - sum(cost.multiply_adds for cost in self):
            table.append(("(outside of layers)", "", "", "", "", f"{outside:,}", "", "", ""))
        table.append(("total", *_cells(self.total)[1:]))
        columns = list(zip(*table, strict=True))
        widths = [max(map(len, column)) for column in columns]
        padded = [
            [text.ljust(width) if i < 2 else text.rjust(width) for text in column]
            for i, (column, width) in enumerate(zip(columns, widths, strict=True))
        ]
        return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def _cells(cost):
    """A Cost as a line of the table."""
    sizes = ["×".join(map(str, size)) for size in (cost.output_size, cost.receptive_field)]
    numbers = [f"{n:,}" for n in (cost.weights, cost.biases, cost.multiply_adds, cost.least_bytes)]
    return (cost.name, cost.layer, sizes[0], *numbers, sizes[1], f"{cost.intensity:.3g}")


def cost(layer, input_size):
    """What a layer, or a module of several, costs: the total of its summary.

    Args:
        layer, input_size: as summary's.

    Returns:
        a Cost.
    """
    return summary(layer, input_size).total


def summary(model, input_size):
    """What each layer of a model costs: sizes, parameters, multiply-adds, least bytes, receptive field, intensity.

    The model is evaluated once on meta tensors in the dtype of its parameters, so that nothing is computed, and nothing
    of it changes. torch.nn's layers and fastconv's are counted alike; any other module without children has a row with
    its sizes, parameters and bytes. A function that is called outside of the layers has no row. If it is no pooling and
    changes the size of the maps, its result is taken to see all of them.

    Args:
        model: any torch.nn.Module with one input.
        input_size: of the input, with or without the batch: (N, C, H, W) or (C, H, W) where the first layer is 2D,
            (N, C, L) or (C, L) where it is 1D, (N, C) or (C,) where it is fully connected. The figures are those of
            the whole batch, or of one image.

    Returns:
        a Summary: a list of Costs with their `total`, which prints as a table.

    Raises:
        ValueError: a lazy layer has no parameters yet. And what the model raises for an input of this size.
    """
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ValueError("a lazy layer has no parameters yet: call the model once before its summary")
    unbatched = len(input_size) == _dimensions(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    dtype = next((t.dtype for t in on_meta.values() if t.is_floating_point()), torch.get_default_dtype())
    x = torch.empty((1, *input_size) if unbatched else tuple(input_size), dtype=dtype, device="meta")

    trace = _Trace(x, unbatched)
    training = [module for module in model.modules() if module.training]
    hooks = [
        module.register_forward_hook(trace.hook(name))
        for name, module in model.named_modules()
        if _is_layer(name, module)
    ]
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops, trace:
            y = torch.func.functional_call(model, on_meta, (x,))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    weights, biases = _parameters(model)
    total = Cost(
        name="",
        layer=type(model).__name__,
        input_size=trace.size(x),
        output_size=trace.size(_tensors(y)[0]),
        weights=weights,
        biases=biases,
        multiply_adds=flops.get_total_flops() // 2,
        least_bytes=sum(cost.least_bytes for cost in trace.costs),
        receptive_field=trace.seen_by(_tensors(y)[0]),
    )
    return Summary(trace.costs, total)


def _dimensions(model):
    """Of an input without the batch, as the first layer that has any tells; None if there is no such layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return 1
        for kind in type(module).__mro__:
            if kind.__module__.startswith("torch.nn.") and kind.__name__.endswith(("1d", "2d", "3d")):
                if kind is not nn.BatchNorm1d:  # which takes matrices, too
                    return int(kind.__name__[-2]) + 1
    return None


def _is_layer(name, module):
    """Whether a module gets a row: it has no children, other than those that make its parameters, and is none of
    those."""
    made = "parametrizations"
    return made not in name.split(".") and all(child == made for child, _ in module.named_children())


def _parameters(module):
    """How many (weights, biases) a module has. A bias is what is called so."""
    weights = biases = 0
    for name, parameter in module.named_parameters():
        if any(part.startswith("bias") for part in name.split(".")):
            biases += parameter.numel()
        else:
            weights += parameter.numel()
    return weights, biases


def _multiply_adds(layer, x, y):
    if isinstance(layer, _CONVOLUTIONS):
        return y.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return x.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return y.numel() * layer.in_features
    return 0


def _least_bytes(layer, inputs, outputs):
    if isinstance(layer, _MOVE_NOTHING):
        return 0
    statistics = [buffer for buffer in layer.buffers() if buffer.is_floating_point()]
    return sum(t.numel() * t.element_size() for t in (*inputs, *layer.parameters(), *statistics, *outputs))


def _tensors(value):
    """The tensors among a value, or in its lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple, type({}.values()))) else []


@dataclass(frozen=True)
class _Field:
    """What an element of a tensor sees of the model's input.

    sees: its rows and columns. jump: by how many of them the view moves from one element to the next.
    size: of the maps; empty where the tensor has none any more.
    """

    sees: tuple[int, ...]
    jump: tuple[int, ...]
    size: tuple[int, ...]

    def through(self, window, stride, size):
        """The field after a sliding window."""
        if not self.size:
            return self
        sees = (s + (w - 1) * j for s, w, j in zip(self.sees, window, self.jump, strict=True))
        jump = (j * step for j, step in zip(self.jump, stride, strict=True))
        return _Field(tuple(sees), tuple(jump), tuple(size))

    def into(self, shape):
        """The field of a result of this shape: the same where the maps have kept their size, else that of all."""
        if not self.size or tuple(shape[-len(self.size) :]) == self.size:
            return self
        return self.through(self.size, self.size, ())

    def joined(self, other):
        """The larger of two fields, in each direction."""
        pairs = ((self.sees, other.sees), (self.jump, other.jump))
        sees, jump = (tuple(map(max, *pair)) for pair in pairs)
        return _Field(sees, jump, self.size or other.size)


class _Trace(TorchFunctionMode):
    """Follows the fields through all functions that are called, and counts the layers by their hooks."""

    def __init__(self, x, unbatched):
        super().__init__()
        self.costs, self.unbatched = [], unbatched
        ones = (1,) * max(0, x.dim() - 2)
        self.fields = {id(x): (x, _Field(ones, ones, tuple(x.shape[2:])))}  # the tensor is kept, and so is its id

    def size(self, tensor):
        return tuple(tensor.shape[1:] if self.unbatched else tensor.shape)

    def seen_by(self, tensor):
        return self.fields[id(tensor)][1].sees if id(tensor) in self.fields else ()

    def record(self, inputs, outputs, field=None):
        """Gives outputs their fields: those of the inputs, joined, or what the function `field` makes of each."""
        known = [self.fields[id(t)][1] for t in inputs if id(t) in self.fields]
        for y in outputs if known else ():
            after = [field(before, y) if field else before.into(y.shape) for before in known]
            joined = after[0]
            for other in after[1:]:
                joined = joined.joined(other)
            self.fields[id(y)] = (y, joined)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        field = None
        if name in _POOL_FUNCTIONS:
            field = _functional_window(*args, **kwargs)
        elif name == "pad":
            field = _sliding(1, 1)
        self.record(_tensors((args, kwargs)), _tensors(result), field)
        return result

    def hook(self, name):
        """A forward hook that counts a layer."""

        def count(layer, inputs, result):
            inputs, outputs = _tensors(inputs), _tensors(result)
            weights, biases = _parameters(layer)
            self.record_layer(layer, inputs, outputs)
            self.costs.append(
                Cost(
                    name=name,
                    layer=type(layer).__name__,
                    input_size=self.size(inputs[0]),
                    output_size=self.size(outputs[0]),
                    weights=weights,
                    biases=biases,
                    multiply_adds=_multiply_adds(layer, inputs[0], outputs[0]),
                    least_bytes=_least_bytes(layer, inputs, outputs),
                    receptive_field=self.seen_by(outputs[0]),
                )
            )

        return count

    def record_layer(self, layer, inputs, outputs):
        """What a layer of torch.nn sees is known. Any other's functions have been followed."""
        if isinstance(layer, (*_CONVOLUTIONS, *_MAX_POOLS)):
            self.record(inputs, outputs, _sliding(layer.kernel_size, layer.stride, layer.dilation))
        elif isinstance(layer, _AVG_POOLS):
            self.record(inputs, outputs, _sliding(layer.kernel_size, layer.stride))
        elif isinstance(layer, _ADAPTIVE_POOLS):
            self.record(inputs, outputs, _adaptive)
        elif type(layer).__module__.startswith(("torch.nn.", "fastconv.")):
            self.record(inputs, outputs)


def _each(value, dimensions):
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * dimensions


def _sliding(kernel_size, stride, dilation=1):
    """What a window makes of a field: a function of the field and the result."""

    def field(before, y):
        n = len(before.size)
        spread = zip(_each(dilation, n), _each(kernel_size, n), strict=True)
        return before.through([d * (k - 1) + 1 for d, k in spread], _each(stride, n), y.shape[-n:] if n else ())

    return field


def _functional_window(input, kernel_size, stride=None, padding=0, dilation=1, *others, **more):
    return _sliding(kernel_size, stride or kernel_size, dilation if isinstance(dilation, (int, list, tuple)) else 1)


def _adaptive(before, y):
    """The largest window of an adaptive pool, and a stride at most as long."""
    size = tuple(y.shape[-len(before.size) :]) if before.size else ()
    pairs = list(zip(before.size, size, strict=True))
    window = [max(-(-(i + 1) * n // m) - i * n // m for i in range(m)) for n, m in pairs]
    return before.through(window, [-(-n // m) for n, m in pairs], size)
