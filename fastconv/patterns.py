"""Finding what can be fused: layer → ReLU and layer → add → ReLU in the graphs that torch.fx traces.

A scope is a module with a forward of its own. It is traced with layers and other scopes as leaves and nn.Sequential
opened, twice, in training and in evaluation.
"""

import inspect
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import FUSED, BatchNorm2d, Conv2d

CONVOLUTIONS = (nn.Conv2d, Conv2d)
BATCH_NORMS = (nn.BatchNorm2d, BatchNorm2d)
_RELU_FUNCTIONS = (torch.relu, torch.relu_, F.relu, F.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Scope:
    """A module with a forward of its own: its graph or the reason why there is none, and the patterns in it."""

    def __init__(self, module):
        self.module, self.graph, self.matches, self.left_alone = module, None, [], []
        self.calls = {}  # of each layer, in all scopes
        self.reason = _trace(self)

    def called(self, node):
        """The layer that a node calls, or None."""
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.module.get_submodule(node.target) if is_call else None

    def unknown_layers(self):
        """Layers that an untraced forward may call in any way: its own, through containers."""
        children = list(self.module.children())
        for child in children:
            if _is_chain(child) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                children += child.children()
        return children


@dataclass
class _Match:
    """layer (a convolution or BatchNorm) → [add →] ReLU: the layers and their nodes."""

    layer: nn.Module
    node: fx.Node
    relu: fx.Node
    relu_layer: nn.Module
    add: fx.Node = None
    is_layer: bool = False  # changing the layers' classes is enough

    @property
    def residual(self):
        """What is added, or None. Asked for late, since other patterns are rewritten, too."""
        if self.add is None:
            return None
        first, second = self.add.args
        return first if second is self.node else second

    @property
    def pattern(self):
        name = "Conv2d" if isinstance(self.layer, nn.Conv2d) else "BatchNorm2d"
        return f"{name} → {'add → ' if self.add is not None else ''}ReLU"


def has_hooks(module):
    return any(vars(module).get(hooks) for hooks in _HOOKS)


def _is_chain(module):
    """Whether it calls its children in a row, and nothing else happens."""
    plain = type(module).forward is nn.Sequential.forward and "forward" not in vars(module)
    return plain and not has_hooks(module)


def _is_layer(module):
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.", "fastconv.")) and not isinstance(
        module, nn.Sequential
    )


_IN_PLACE = [getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")]


class _Proxy(fx.Proxy):
    """Records x += y as such. fx's own takes it for x = x + y, which is another thing where x has a second name."""


for _function in _IN_PLACE:

    def _method(self, other, function=_function):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{_function.__name__}__", _method)


class _Tracer(fx.Tracer):
    def proxy(self, node):
        return _Proxy(node, self)

    def is_leaf_module(self, module, name):
        return not _is_chain(module)


def _trace(scope):
    """Sets the scope's graph; returns why that is impossible, or an empty string."""
    module = scope.module
    if "forward" in vars(module):
        return "its forward is the instance's own"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if not _is_chain(module) and any(p.default is not p.empty or p.kind != p.POSITIONAL_OR_KEYWORD for p in parameters):
        return "its forward has optional arguments"
    flags = {m: m.training for m in module.modules()}
    attributes = dict(vars(module))
    graphs = []
    try:
        for training in (True, False):
            for m in flags:
                vars(m)["training"] = training
            graphs.append(_Tracer().trace(module))
    except Exception as error:  # whatever its forward makes of a proxy
        return f"its forward cannot be traced: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        changed = {k for k in vars(module).keys() | attributes if k != "training"} - {
            k for k, v in attributes.items() if vars(module).get(k, vars) is v
        }
        vars(module).clear()
        vars(module).update(attributes)
        for m, training in flags.items():
            vars(m)["training"] = training
    if changed:
        return f"its forward changes {', '.join(sorted(changed))}"
    if str(graphs[0]) != str(graphs[1]):
        return "its forward is another in training than in evaluation"
    scope.graph = graphs[0]
    return ""


def analyze(root):
    """The scopes of a module, with what can be fused in each and what is left alone."""
    modules = list(root.modules())
    inside = {child for m in modules if _is_layer(m) for child in m.children()}  # of DataParallel and the like
    scopes = [
        Scope(m)
        for m in modules
        if not (_is_layer(m) or _is_container(m)) and (m is root or m in inside or not _is_chain(m))
    ]
    calls = {}
    for scope in scopes:
        called = scope.unknown_layers() * 2 if scope.reason else map(scope.called, scope.graph.nodes)
        for layer in called:
            calls[layer] = calls.get(layer, 0) + 1
    for scope in scopes:
        scope.calls = calls
        for match in [] if scope.reason else _candidates(scope):
            reason = _objection(scope, match)
            match.is_layer = match.add is None and match.relu_layer is not None and calls[match.relu_layer] == 1
            if reason:
                scope.left_alone.append((match, reason))
            else:
                scope.matches.append(match)
    return scopes


def _is_container(module):
    return type(module) in (nn.ModuleList, nn.ModuleDict)


def _candidates(scope):
    for relu in scope.graph.nodes:
        if not _is_relu(scope, relu):
            continue
        before, relu_layer = relu.args[0], scope.called(relu)
        layer = scope.called(before)
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) and len(before.args) == 1 and not before.kwargs:
            if not isinstance(layer, FUSED):
                yield _Match(layer, before, relu, relu_layer)
        elif _is_add(before):
            order = list(scope.graph.nodes)
            # Of two BatchNorms the one that is computed last.
            for node in sorted(before.args, key=order.index, reverse=True):
                layer = scope.called(node)
                if isinstance(layer, nn.BatchNorm2d) and len(node.args) == 1 and not node.kwargs:
                    if not isinstance(layer, FUSED):
                        yield _Match(layer, node, relu, relu_layer, before)
                    break


def _is_relu(scope, node):
    if node.op == "call_module":
        return type(scope.called(node)) is nn.ReLU
    is_function = node.op == "call_function" and node.target in _RELU_FUNCTIONS
    is_method = node.op == "call_method" and node.target in ("relu", "relu_")
    return (is_function or is_method) and len(node.args) >= 1 and isinstance(node.args[0], fx.Node)


def _is_add(node):
    is_function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    both = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs
    return (is_function or is_method) and both


def _is_in_place(scope, node):
    if node.op == "call_module":
        return getattr(scope.called(node), "inplace", False)
    named = node.op == "call_method" and node.target.endswith("_")
    return named or node.target in (*_IN_PLACE, torch.relu_, F.relu_) or bool(node.kwargs.get("inplace"))


def _objection(scope, match):
    """Why a pattern is left alone, or an empty string."""
    layer, relu_layer = match.layer, match.relu_layer
    kinds = CONVOLUTIONS if isinstance(layer, nn.Conv2d) else BATCH_NORMS
    if type(layer) not in kinds:
        return "a subclass, which may compute something else"
    if scope.calls[layer] > 1:
        return "the layer is called more than once"
    if has_hooks(layer) or (relu_layer is not None and has_hooks(relu_layer)):
        return "a layer has hooks"
    inner = (match.node,) if match.add is None else (match.node, match.add)
    if any(len(node.users) > 1 for node in inner):
        return "a result in between is used elsewhere"
    if match.add is not None:
        if match.residual is match.node:
            return "the layer's result is added to itself"
        in_place = match.add.target in (operator.iadd, "add_")
        own = isinstance(scope.called(match.residual), (nn.Conv2d, nn.BatchNorm2d)) and len(match.residual.users) == 1
        if in_place and match.add.args[0] is match.residual and not own:
            return "the sum is written over what is added"
    order = list(scope.graph.nodes)
    between = order[order.index(match.node) + 1 : order.index(match.relu)]
    if any(_is_in_place(scope, node) for node in between if node is not match.add):
        return "something is changed in place in between"
    return ""
