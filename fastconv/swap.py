"""Swapping a model's layers for fastconv's and back, and a table of what was swapped."""

from dataclasses import dataclass

from torch.nn.utils import parametrize

from .fusion import unfuse
from .modules import FUSED, SWAPS

_BACK = {ours: theirs for theirs, ours in SWAPS.items()}


def convert(module):
    """Swap every torch.nn layer that fastconv has for fastconv's, in place.

    Parameters, buffers, hooks, training flag, device and dtype are shared with the original layer: it is the same
    object with another class. Subclasses of torch.nn's layers are left alone, since they may compute something else.

    Args:
        module: any torch.nn.Module, or a single layer.

    Returns:
        the module itself.
    """
    return _swap(module, SWAPS)


def revert(module):
    """Undo convert() and fuse(): layers become torch.nn's again, in place. Returns the module itself."""
    return _swap(unfuse(module), _BACK)


def _swap(module, classes):
    for layer in module.modules():  # each layer once, however often it is shared
        if target := classes.get(_plain_class(layer)):
            if parametrize.is_parametrized(layer):
                # parametrize gave this layer a class of its own, derived from the plain one.
                layer.__class__ = type(type(layer).__name__, (target,), dict(vars(type(layer))))
            else:
                layer.__class__ = target
    return module


def _plain_class(layer):
    """The class of a layer, or the one below it if parametrize has put its own on top."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


@dataclass(frozen=True)
class Row:
    """One layer of coverage(): its dotted name, its class, whether fastconv computes it, and why not otherwise."""

    name: str
    layer: str
    swapped: bool
    reason: str


class Coverage(list):
    """A list of Rows that prints as a table."""

    def __str__(self):
        widths = [max((len(getattr(row, field)) for row in self), default=0) for field in ("name", "layer")]
        lines = [
            f"{row.name:{widths[0]}}  {row.layer:{widths[1]}}  {'fastconv' if row.swapped else 'torch'}"
            + (f"  ({row.reason})" if row.reason else "")
            for row in self
        ]
        return "\n".join(lines)


def coverage(module):
    """Which layers fastconv computes, and why not the others.

    Args:
        module: any torch.nn.Module.

    Returns:
        a list of rows (name, layer, swapped, reason), one for each layer without children; printing it gives a table.
    """
    rows = Coverage()
    for name, layer in module.named_modules():
        kind = _plain_class(layer)
        swapped = kind in _BACK or kind in FUSED
        if not swapped and next(layer.children(), None) is not None:
            continue
        if swapped:
            reason = ""
        elif kind in SWAPS:
            reason = "not converted: call fastconv.convert"
        elif isinstance(layer, tuple(SWAPS)):
            reason = "a subclass, which may compute something else"
        else:
            reason = "fastconv has no such layer"
        rows.append(Row(name or "(root)", kind.__name__, swapped, reason))
    return rows
