"""Batch normalization in float64, and a-priori bounds on what rounding may do to it.

With n values a channel, u the unit roundoff of the statistics and M the largest |x|:

    mean       by Welford, each step rounds a value of size M three times: δμ ≤ γ_{n+8}·M
    variance   Chan, Golub and LeVeque (1983), table 1: the relative error of Welford's is n·κ·u with κ = √(1 + μ²/σ²),
               the condition number of the problem; four roundings a value make it γ_{4(n+1)}·κ to first order
    x̂          = (x − μ)·invstd: the errors of both factors, and of x and μ, each rounded on the way
    gradients  sums of n products, with the error of x̂ carried through

The textbook E[x²] − E[x]² has κ² for κ, and fails these bounds where the mean is much larger than the deviation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from references import LOW_PRECISION, accumulator, gamma, unit_roundoff


@dataclass
class Bounded:
    """An exact result and a bound on the error of each of its elements, before a last rounding. Float64 on the CPU."""

    value: torch.Tensor
    error: torch.Tensor

    def bound(self, dtype):
        if self.value.numel() == 0:
            return 0.0
        bound = self.error.max().item()
        if dtype in LOW_PRECISION:
            bound += unit_roundoff(dtype) * (self.value.abs().max().item() + bound)
            bound += torch.finfo(dtype).tiny * unit_roundoff(dtype)
        return bound


def _per_channel(values, x):
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def batch_norm_reference(x, weight, bias, running_mean, running_var, dy, training, momentum, eps):
    """Bounded y, dx, dweight, dbias, and the running mean and variance after the call, by name."""
    dtype = accumulator(x.dtype)
    u = unit_roundoff(dtype)
    channels = x.shape[1]
    n = x.numel() // channels
    x, dy, r_mean, r_var = (t.detach().cpu().double() for t in (x, dy, running_mean, running_var))
    w = weight.detach().cpu().double() if weight is not None else torch.ones(channels, dtype=torch.float64)
    b = bias.detach().cpu().double() if bias is not None else torch.zeros(channels, dtype=torch.float64)

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    new_mean, new_var = r_mean.clone(), r_var.clone()
    y = F.batch_norm(leaves[0], new_mean, new_var, *leaves[1:], training, momentum, eps)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)

    dims = [d for d in range(x.dim()) if d != 1]
    if training:
        mean, var = x.mean(dims), x.var(dims, correction=0)
        mean_error = gamma(n + 8, dtype) * x.abs().amax(dims)
        kappa_variance = var.sqrt() * (var + mean**2).sqrt()  # κ·σ²
        first_order = gamma(4 * (n + 1), dtype) * kappa_variance
        var_error = first_order + mean_error**2
    else:
        mean, var = r_mean, r_var
        mean_error = var_error = torch.zeros_like(r_mean)

    # invstd = (σ² + eps)^−½ varies by half as much, relatively; then a sum, a root and a quotient are rounded.
    relative = var_error / (2 * (var + eps)) * (1 + var_error / (var + eps)) + 3 * u
    invstd, relative, mean_c, mean_error_c, w_c, b_c = (
        _per_channel(t, x) for t in ((var + eps).rsqrt(), relative, mean, mean_error, w, b)
    )
    deviation = (x - mean_c).abs()
    x_hat = deviation * invstd
    x_hat_error = (relative + 3 * u) * x_hat + invstd * (mean_error_c + 3 * u * (x.abs() + mean_c.abs()))
    y_error = w_c.abs() * x_hat_error + 2 * u * (y.detach().abs() + b_c.abs())

    dweight_error = (dy.abs() * (gamma(n + 2, dtype) * x_hat + x_hat_error)).sum(dims)
    dbias_error = gamma(n, dtype) * dy.abs().sum(dims)
    scale = w_c.abs() * invstd
    if training:
        mean_dy, mean_product = dy.abs().mean(dims, keepdim=True), (dy.abs() * x_hat).mean(dims, keepdim=True)
        mean_product_error = (dy.abs() * x_hat_error).mean(dims, keepdim=True)
        terms = dy.abs() + mean_dy + x_hat * mean_product
        carried = x_hat_error * mean_product + x_hat * mean_product_error
        dx_error = scale * ((gamma(n + 8, dtype) + relative) * terms + carried)
    else:
        dx_error = scale * (relative + 3 * u) * dy.abs()

    unbiased = n / max(n - 1, 1)
    new_mean_error = momentum * mean_error + 4 * u * (r_mean.abs() + mean.abs())
    new_var_error = momentum * var_error * unbiased + 5 * u * (r_var.abs() + var * unbiased)
    return {
        "y": Bounded(y.detach(), y_error),
        "dx": Bounded(dx, dx_error),
        "dweight": Bounded(dweight, dweight_error),
        "dbias": Bounded(dbias, dbias_error),
        "running_mean": Bounded(new_mean, new_mean_error),
        "running_var": Bounded(new_var, new_var_error),
    }
