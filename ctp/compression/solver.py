"""One solver for GPTQ, SparseGPT and both at once: tensors in, tensors out.

Notation of the papers (GPTQ: Frantar et al. 2022, algorithm 1; SparseGPT: Frantar & Alistarh 2023, algorithm 1):
weight W (outputs, inputs), Hessian H = 2 X X^T of the layer's squared output error, U the upper Cholesky factor of
H^-1 = U^T U. Inputs ("columns") are settled one after the other: column j takes its final value q_j, its error
e_j = (w_j - q_j) / U_jj is spread over the columns not yet settled, W_k -= e_j U_jk. Inside a block of `block_size`
columns this happens at once, on the columns behind the block once per block ("lazy batch updates").
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctp.compression.layer import Layer
from ctp.compression.quantize import fit, to_storage
from ctp.methods import Solver, SparseGPT


@dataclass(frozen=True, eq=False)
class Inverse:
    """What the linears on one input share: U and the damped H (inputs, inputs), column order, dead inputs (inputs,).

    Rows and columns of both are in `order`; dead (bool, in the model's order): 0 on all calibration tokens.
    """

    upper: Tensor
    damped: Tensor
    order: Tensor
    dead: Tensor


def factorise(hessian: Tensor, damping: float, act_order: bool) -> Inverse:
    """The upper Cholesky factor of the inverse of the damped Hessian (inputs, inputs), in the Hessian's dtype.

    Inverting a triangle is cheaper and more exact than inverting H and factorising again: H = R R^T with R upper
    gives U = R^-1, and R is the lower factor of H with rows and columns reversed. Any positive multiple of H gives
    the same solution. Raises ValueError if H is not finite or not positive definite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian is not finite: an activation overflowed or is NaN")
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    order = torch.arange(len(diagonal), device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    damped = hessian[order][:, order]
    # A dead input has a zero row and column; any positive diagonal leaves it alone.
    damped.diagonal().add_(damping * mean).add_(dead[order].to(hessian.dtype) * mean)
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info):
        raise ValueError(f"the Hessian is not positive definite at damping = {damping}: raise damping")
    eye = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return Inverse(upper, damped, order, dead)


def check_shape(columns: int, compression: Solver) -> None:
    """Raises ValueError where a group size or n:m pattern does not divide the number of inputs."""
    sizes = {"group_size": compression.group_size}
    if isinstance(compression, SparseGPT) and compression.pattern is not None:
        sizes["m of pattern"] = compression.n_of_m[1]
    for name, size in sizes.items():
        if size is not None and columns % size:
            allowed = [d for d in range(2, columns + 1) if columns % d == 0]
            raise ValueError(f"{name} = {size} does not divide {columns} inputs; allowed: {allowed}")


@dataclass
class _Grids:
    """Scales and zero points (groups, outputs), and the group of every column in solving order."""

    bits: int
    sym: bool
    mse: bool
    model: torch.dtype
    size: int
    dynamic: bool  # fitted when the solver reaches a group, on the weights as they are then
    group: list[int]
    scale: Tensor
    zero: Tensor
    span: tuple[Tensor, Tensor] = field(init=False)

    def set(self, group: int, weights: Tensor) -> None:
        self.scale[group], self.zero[group] = fit(weights, self.bits, sym=self.sym, mse=self.mse, model=self.model)

    def bounds(self) -> None:
        self.span = (-self.zero, 2**self.bits - 1 - self.zero)

    def reach(self, column: int, work: Tensor) -> None:
        """Before column is settled: fit its group if it opens one. work: (columns, outputs)."""
        if self.dynamic and column % self.size == 0:
            self.set(column // self.size, work[column : column + self.size])
            self.bounds()

    def round(self, column: int, w: Tensor) -> Tensor:
        g = self.group[column]
        steps = torch.div(w, self.scale[g]).round_()
        return torch.clamp(steps, self.span[0][g], self.span[1][g], out=steps).mul_(self.scale[g])


def _grids(original: Tensor, order: Tensor, compression: Solver, model: torch.dtype) -> _Grids | None:
    """original: (columns, outputs) in the model's order."""
    bits: int | None = getattr(compression, "bits", None)
    if bits is None:
        return None
    columns, rows = original.shape
    size = compression.group_size or columns
    static = compression.static_groups or size == columns
    group = order // size if static else torch.arange(columns) // size
    empty = original.new_ones(columns // size, rows)
    grids = _Grids(
        bits, compression.sym, compression.scale == "mse", model, size, not static, group.tolist(), empty, empty.clone()
    )
    if static:
        for g in range(columns // size):
            grids.set(g, original[g * size : (g + 1) * size])
    grids.bounds()
    return grids


@dataclass
class _Pruning:
    """Which weights fall: `drop` (columns, outputs) bool in solving order, chosen block by block."""

    drop: Tensor
    sparsity: float | None
    n_of_m: tuple[int, int] | None
    done: int = 0

    def open_block(self, start: int, work: Tensor, diagonal: Tensor) -> None:
        """Unstructured: the block's weights with the least w^2 / U_jj^2 (SparseGPT, section 3.3).

        The counts of the blocks add up to round(sparsity * weights) exactly.
        """
        if self.sparsity is None:
            return
        score = (work / diagonal[:, None]).square_().flatten()
        reached = (start + len(work)) * work.shape[1]
        count = round(self.sparsity * reached) - self.done
        self.done += count
        drop = torch.zeros_like(score, dtype=torch.bool)
        drop[torch.topk(score, count, largest=False, sorted=False).indices] = True
        self.drop[start : start + len(work)] = drop.view_as(work)

    def reach(self, column: int, work: Tensor, diagonal: Tensor) -> None:
        """n:m: the n least of the next m columns, chosen when the first of them is reached."""
        if self.n_of_m is None or column % self.n_of_m[1]:
            return
        n, m = self.n_of_m
        score = (work[column : column + m] / diagonal[column : column + m, None]).square_()
        self.drop[column : column + m].scatter_(0, torch.topk(score, n, dim=0, largest=False).indices, True)


def _pruning(work: Tensor, compression: Solver) -> _Pruning | None:
    if not isinstance(compression, SparseGPT):
        return None
    n_of_m = None if compression.pattern is None else compression.n_of_m
    return _Pruning(torch.zeros_like(work, dtype=torch.bool), compression.sparsity, n_of_m)


def _block(compression: Solver, columns: int) -> int:
    """block_size, raised to whole groups and patterns: a grid is fitted on columns that are up to date."""
    group = compression.group_size if getattr(compression, "bits", None) else None
    m = compression.n_of_m[1] if isinstance(compression, SparseGPT) and compression.pattern else 1
    unit = math.lcm(group or 1, m)
    return min(math.ceil(compression.block_size / unit) * unit, columns)


def solve(weight: Tensor, inverse: Inverse, compression: Solver) -> tuple[Tensor, Layer]:
    """Compresses one weight (outputs, inputs); returns it in its own dtype and device, and its compressed form.

    Computed in the dtype of `inverse`. Raises ValueError where group size or pattern does not fit the shape.
    """
    check_shape(weight.shape[1], compression)
    # Columns as contiguous rows: every step of the loop works on one of them.
    original = weight.detach().to(inverse.upper.dtype).T.contiguous()
    original[inverse.dead] = 0
    work = original[inverse.order]
    grids = _grids(original, inverse.order, compression, weight.dtype)
    pruning = _pruning(work, compression)
    block = _block(compression, len(work))
    for start in range(0, len(work), block):
        stop = min(start + block, len(work))
        errors = _settle(work, inverse.upper, start, stop, grids, pruning)
        if stop < len(work):
            work[stop:].addmm_(inverse.upper[start:stop, stop:].T, errors, alpha=-1)
    if grids and compression.refit:
        _refit(work, original[inverse.order], inverse.damped, grids)
    return _finish(work, weight, inverse, grids, pruning)


def _settle(
    work: Tensor, upper: Tensor, start: int, stop: int, grids: _Grids | None, pruning: _Pruning | None
) -> Tensor:
    """Settles columns start .. stop of work in place; returns their errors e_j (stop - start, outputs)."""
    diagonal = upper.diagonal()
    errors = torch.empty_like(work[start:stop])
    divisors = diagonal[start:stop].tolist()
    if pruning:
        pruning.open_block(start, work[start:stop], diagonal[start:stop])
    for j in range(start, stop):
        w = work[j]
        if pruning:
            pruning.reach(j, work, diagonal)
        if grids:
            grids.reach(j, work)
        q = grids.round(j, w) if grids else w.clone()
        if pruning:
            q.masked_fill_(pruning.drop[j], 0)
        error = torch.sub(w, q, out=errors[j - start]).div_(divisors[j - start])
        if j + 1 < stop:
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        w.copy_(q)
    return errors


def _refit(work: Tensor, target: Tensor, damped: Tensor, grids: _Grids) -> None:
    """Least squares for each output's scales s_g, codes fixed: min ||(w - sum_g s_g c_g) X||^2, c_g the code steps of
    group g. Normal equations A s = b, A_gh = c_g H c_h and b_g = c_g H w; work and grids.scale change in place.
    """
    group = torch.tensor(grids.group, device=work.device)
    old = grids.scale
    steps = work.div(old[group]).round_()

    def by_group(x: Tensor) -> Tensor:
        return torch.zeros_like(old).index_add_(0, group, x)

    b = by_group(steps * (damped @ target)).T
    members = [(group == g).nonzero()[:, 0] for g in range(len(old))]
    a = torch.stack([by_group(steps * (damped[:, m] @ steps[m])) for m in members]).permute(2, 0, 1)
    # A light pull towards the old scale: a group whose codes are all zero keeps it.
    ridge = 1e-4 * a.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30
    new = torch.linalg.solve(a + torch.diag_embed(ridge.expand_as(b)), b + ridge * old.T)
    sound = ((new > 0) & (new < 2 * old.T)).all(1, keepdim=True)
    grids.scale = to_storage(torch.where(sound, new, old.T).T.contiguous(), grids.model)
    torch.mul(steps, grids.scale[group], out=work)


def _finish(
    work: Tensor, weight: Tensor, inverse: Inverse, grids: _Grids | None, pruning: _Pruning | None
) -> tuple[Tensor, Layer]:
    """Back to the model's order of inputs, and into the compressed form."""
    back = torch.argsort(inverse.order)
    work.add_(0)  # -0 becomes 0, the only zero that codes and masks give back
    final = work[back].T.contiguous().to(weight.dtype)
    shape = (weight.shape[0], weight.shape[1])
    mask = None if pruning is None else ~pruning.drop[back].T.contiguous().cpu()
    if grids is None:
        assert mask is not None
        return final, Layer(shape, mask=mask, values=final.cpu()[mask])
    group = torch.tensor(grids.group, device=work.device)
    codes = work.div_(grids.scale[group]).round_().add_(grids.zero[group])[back].T
    codes = codes.to(torch.uint8).contiguous().cpu()
    if mask is not None:
        codes.masked_fill_(~mask, 0)
    g_idx = group[back].to(torch.int32).cpu()
    regular = torch.equal(g_idx, torch.arange(shape[1], dtype=torch.int32) // grids.size)
    layer = Layer(
        shape,
        bits=grids.bits,
        codes=codes,
        scale=grids.scale.T.to(torch.float16).contiguous().cpu(),
        zero=None if grids.sym else grids.zero.T.to(torch.uint8).contiguous().cpu(),
        g_idx=None if regular else g_idx,
        mask=mask,
    )
    return final, layer
