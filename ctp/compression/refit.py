"""Scales fitted anew when all codes are settled, by least squares on the layer's output error."""

import torch
from torch import Tensor

from ctp.compression.quantize import to_storage

PULL = 1e-4  # towards the old scales, as a fraction of the normal equations' mean diagonal


def refit(
    work: Tensor, errors: Tensor, root: Tensor, damped: Tensor, group: Tensor, scale: Tensor, model: torch.dtype
) -> Tensor:
    """The scales (groups, outputs) that minimise ||(w - sum_g s_g c_g) X||^2 for each output, codes fixed.

    c_g: the code steps of group g. The normal equations for the change d of the scales are A d = r, with
    A_gh = c_g H c_h and r_g = c_g H (w - q). The solver's errors e make r cheap: w - q = e U and H = R R^T with
    R = U^-1, so that H (w - q) = R e. work (columns, outputs), the settled weights, changes in place.

    errors: e (columns, outputs). root: R, damped: H (columns, columns). group: int64 (columns,). An output whose new
    scales are not all positive and below twice the old ones keeps its own. model: the dtype that scales are stored for.
    """
    steps = work.div(scale.index_select(0, group)).round_()
    if len(scale) == 1:
        a, r = _one_group(steps, errors, root)
    else:
        a, r = _groups(steps, errors, root, damped, group, len(scale))
    # The pull keeps a group whose codes are all zero as it is.
    a.diagonal().add_(PULL * a.diagonal().mean(1, keepdim=True) + 1e-30)
    new = scale + _solve(a, r)
    sound = ((new > 0) & (new < 2 * scale)).all(0)
    new = to_storage(torch.where(sound, new, scale), model)
    torch.mul(steps, new.index_select(0, group), out=work)
    return new


def _one_group(steps: Tensor, errors: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """A (1, 1, outputs) = ||R^T c||^2 and r (1, outputs) = (R^T c) e: one product with a triangle gives both."""
    a, r = steps.new_zeros(steps.shape[1]), steps.new_zeros(steps.shape[1])
    for rows in stripes(len(steps)):
        part = root[: rows.stop, rows].T @ steps[: rows.stop]
        r += (part * errors[rows]).sum(0)
        a += part.square_().sum(0)
    return a[None, None], r[None]


def _groups(
    steps: Tensor, errors: Tensor, root: Tensor, damped: Tensor, group: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """A (groups, groups, outputs) and r (groups, outputs)."""
    columns, outputs = steps.shape
    size = columns // count
    pushed = torch.empty_like(steps)
    for rows in stripes(columns):
        torch.matmul(root[rows, rows.start :], errors[rows.start :], out=pushed[rows])
    order = torch.argsort(group, stable=True)
    if not bool((order == torch.arange(columns, device=order.device)).all()):
        steps, pushed = steps.index_select(0, order), pushed.index_select(0, order)
        damped = damped.index_select(0, order).index_select(1, order)
    r = pushed.mul_(steps).view(count, size, outputs).sum(1)
    a = steps.new_empty(count, count, outputs)
    for g in range(count):  # H is symmetric: half of A is enough
        inside, later = slice(g * size, (g + 1) * size), slice(g * size, columns)
        products = (damped[later, inside] @ steps[inside]).mul_(steps[later]).view(count - g, size, outputs).sum(1)
        a[g, g:], a[g:, g] = products, products
    return a, r


def _solve(a: Tensor, r: Tensor) -> Tensor:
    """x of a x = r for symmetric positive definite a (n, n, outputs), r (n, outputs), both overwritten.

    Elimination, each step for all outputs: LAPACK solves systems this small one after the other.
    """
    n = len(r)
    for k in range(n - 1):
        factor = a[k + 1 :, k] / a[k, k]
        a[k + 1 :, k + 1 :].sub_(factor[:, None] * a[k, None, k + 1 :])
        r[k + 1 :].sub_(factor * r[k])
    for k in reversed(range(n)):
        r[k] = (r[k] - (a[k, k + 1 :] * r[k + 1 :]).sum(0)) / a[k, k]
    return r


def stripes(columns: int) -> list[slice]:
    """Runs of columns: what a triangle has zeros beside is left out, and products stay large."""
    step = max(128, columns // 8)
    return [slice(i, min(i + step, columns)) for i in range(0, columns, step)]
