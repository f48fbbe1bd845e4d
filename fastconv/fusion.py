"""Fusing a model's layers, and undoing it.

Each of these becomes one pass over memory, in training and in evaluation, with the same parameters and state_dict:

    Conv2d → ReLU, BatchNorm2d → ReLU, BatchNorm2d → add → ReLU

Patterns are found by torch.fx, which traces each module that has a forward of its own, with layers and other such
modules as leaves and nn.Sequential opened. A pattern whose ReLU is a layer called once needs no change of code: the
layers get other classes, and the ReLU passes on what it is given. Where the ReLU is a function or shared, or there is
something to add, the module gets a forward generated from the graph. All of it is done in place, by __class__.
"""

import importlib
import types
from dataclasses import dataclass

import torch
from torch import nn

from .modules import AbsorbedReLU, BatchNormAct2d, ConvAct2d, FoldedBatchNorm2d, FoldedConv2d
from .patterns import BATCH_NORMS, CONVOLUTIONS, analyze, has_hooks

_BEFORE = "_class_before_fusion"  # of a fused layer or module, in its __dict__


def fuse(module, fold=False):
    """Fuse convolutions and BatchNorms with the ReLU behind them, in place.

    Conv2d → ReLU becomes a ConvAct2d, BatchNorm2d → ReLU and BatchNorm2d → add → ReLU become a BatchNormAct2d, whether
    the layers are torch.nn's or fastconv's. Parameters, buffers and the keys of state_dict stay, so checkpoints can be
    exchanged both ways. Left alone, and listed with the reason by fusions(), is a pattern

    - with a layer that is called more than once, has hooks, or is of a subclass;
    - whose results in between are used elsewhere too;
    - in a module whose forward cannot be traced, has optional arguments, or is another in training than in evaluation.

    Hooks are looked at now: of a layer that is fused, those that are registered later see the fused results. A module
    whose forward is generated has the numbers in it that it has now, does not call its nn.Sequentials as such, and its
    other methods must not call the fused layers.

    Args:
        module: any torch.nn.Module. Its training flags do not matter, but for fold.
        fold: for evaluation only, also let each convolution take in the BatchNorm behind it. Its parameters stay; the
            folded weights are buffers that state_dict leaves out. Until unfuse(), no state_dict can be loaded.

    Returns:
        the module itself.

    Raises:
        ValueError if `fold` is asked of a module in training.
    """
    if fold:
        unfuse(module)
    if fold and any(isinstance(m, (*CONVOLUTIONS, *BATCH_NORMS)) and m.training for m in module.modules()):
        raise ValueError("fold is for evaluation: call module.eval() first")
    for scope in analyze(module):
        pairs = _pairs_to_fold(scope) if fold else []
        with_relu = {match.layer for match in scope.matches if match.add is None}
        for match in scope.matches:
            _become(match.layer, ConvAct2d if isinstance(match.layer, nn.Conv2d) else BatchNormAct2d)
            if match.is_layer:
                _become(match.relu_layer, AbsorbedReLU)
        if any(not match.is_layer for match in scope.matches):
            _rewrite(scope)
        for convolution, batch_norm in pairs:
            _fold(convolution, batch_norm, batch_norm in with_relu)
    return module


def unfuse(module):
    """Undo fuse(): every layer and module is of the class it was, and computes what it did. Returns the module."""
    for layer in module.modules():
        if _BEFORE in vars(layer):
            if isinstance(layer, FoldedConv2d):
                del layer.folded_weight, layer.folded_bias, layer.folded_relu
            layer.__class__ = vars(layer).pop(_BEFORE)
    return module


@dataclass(frozen=True)
class Fusion:
    """One line of fusions(): a layer's dotted name, what it is or could be fused to, whether it is, or why not."""

    name: str
    pattern: str
    fused: bool
    reason: str


class Fusions(list):
    """A list of Fusions that prints as a table."""

    def __str__(self):
        widths = [max((len(getattr(row, field)) for row in self), default=0) for field in ("name", "pattern")]
        return "\n".join(
            f"{row.name:{widths[0]}}  {row.pattern:{widths[1]}}  "
            + ("fused" if row.fused else f"not fused  ({row.reason})")
            for row in self
        )


def fusions(module):
    """What is fused in a module, what could be, and why the rest is left alone.

    Returns:
        a list of rows (name, pattern, fused, reason); printing it gives a table.
    """
    names = {layer: name or "(root)" for name, layer in module.named_modules()}
    rows = Fusions()
    for layer, name in names.items():
        if _BEFORE in vars(layer) and isinstance(layer, (ConvAct2d, BatchNormAct2d, FoldedConv2d)):
            rows.append(Fusion(name, type(layer).__name__, True, ""))
    for scope in analyze(module):
        if scope.reason:
            rows.append(Fusion(names[scope.module], "", False, scope.reason))
        rows += [Fusion(names[m.layer], m.pattern, False, "call fastconv.fuse") for m in scope.matches]
        rows += [Fusion(names[m.layer], m.pattern, False, reason) for m, reason in scope.left_alone]
    return Fusions(dict.fromkeys(rows))  # a layer that is called in several modules once


# ---- Changing ----


def _become(layer, kind):
    vars(layer).setdefault(_BEFORE, type(layer))
    layer.__class__ = kind


def _rewrite(scope):
    """Gives the module a forward in which the layers of its matches do the rest of the pattern, too."""
    graph = scope.graph
    for match in scope.matches:
        if match.is_layer:
            continue
        with graph.inserting_before(match.relu):
            residual = () if match.residual is None else (match.residual,)
            fused = graph.call_module(match.node.target, (*match.node.args, *residual))
        match.relu.replace_all_uses_with(fused)
        for node in (match.relu, match.add, match.node):
            if node is not None:
                graph.erase_node(node)
        match.node = fused
    graph.lint()
    code = graph.python_code("self")
    _become(scope.module, _rewritten(type(scope.module), code.src, code.globals))


def _rewritten(kind, source, names):
    """A subclass of `kind` whose forward is this source; instances can be copied and pickled."""
    namespace = dict(names)
    exec(compile(source, f"<{kind.__name__}, fused>", "exec"), namespace)
    used = {n: v for n, v in names.items() if n in namespace["forward"].__code__.co_names}
    modules = {n: v.__name__ for n, v in used.items() if isinstance(v, types.ModuleType)}
    functions = {n: v for n, v in used.items() if n not in modules}

    def __reduce_ex__(self, protocol):
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)  # from Python 3.11 on
        return _restored, (kind, source, modules, functions), state

    body = {"forward": namespace["forward"], "__reduce_ex__": __reduce_ex__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


def _restored(kind, source, modules, functions):
    names = functions | {name: importlib.import_module(module) for name, module in modules.items()}
    kind = _rewritten(kind, source, names)
    return kind.__new__(kind)


# ---- Folding ----


def _pairs_to_fold(scope):
    """The convolutions of a scope that can take in the BatchNorm behind them: (layer, BatchNorm)."""
    pairs = []
    for node in [] if scope.reason else scope.graph.nodes:
        batch_norm = scope.called(node)
        convolution = scope.called(node.args[0]) if isinstance(batch_norm, nn.BatchNorm2d) else None
        if type(convolution) in CONVOLUTIONS and type(batch_norm) in BATCH_NORMS and len(node.args[0].users) == 1:
            called_once = scope.calls[convolution] == scope.calls[batch_norm] == 1
            hooked = has_hooks(convolution) or has_hooks(batch_norm)
            if called_once and not hooked and batch_norm.running_mean is not None:
                pairs.append((convolution, batch_norm))
    return pairs


def _fold(convolution, batch_norm, with_relu):
    """BatchNorm in evaluation is affine, and so its composition with a convolution is a convolution:
    weight' = weight·γ/√(σ² + eps), bias' = (bias − μ)·γ/√(σ² + eps) + β."""
    with torch.no_grad():
        weight, mean = convolution.weight, batch_norm.running_mean.double()
        scale = (batch_norm.running_var.double() + batch_norm.eps).rsqrt()
        if batch_norm.weight is not None:
            scale = scale * batch_norm.weight.double()
        shift = (0 if convolution.bias is None else convolution.bias.double()) - mean
        shift = shift * scale if batch_norm.bias is None else shift * scale + batch_norm.bias.double()
        _become(convolution, FoldedConv2d)
        _become(batch_norm, FoldedBatchNorm2d)
        folded = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
        convolution.register_buffer("folded_weight", folded, persistent=False)
        convolution.register_buffer("folded_bias", shift.to(weight.dtype), persistent=False)
        convolution.folded_relu = with_relu
