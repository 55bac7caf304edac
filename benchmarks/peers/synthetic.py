"""A LLaMA-shaped block of random weights and correlated inputs, the same in every environment; needs torch alone."""

import torch
from torch import Tensor

Block = list[tuple[Tensor, list[Tensor]]]


def block(hidden: int, inner: int, device: str) -> Block:
    """(Hessian, weights of the linears on that input): q, k, v; o; gate, up; down. Numbers are drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)
    groups = [(hidden, [hidden] * 3), (hidden, [hidden]), (hidden, [inner] * 2), (inner, [hidden])]
    return [(hessian(n, generator, device), [draw(m, n, generator, device) for m in rows]) for n, rows in groups]


def draw(rows: int, columns: int, generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(rows, columns, generator=generator).to(device)


def hessian(n: int, generator: torch.Generator, device: str) -> Tensor:
    """X^T X / tokens of 2 n tokens that share an eighth of their directions, with inputs of very different size."""
    shared = draw(2 * n, n // 8, generator, device) @ draw(n // 8, n, generator, device) / (n // 8) ** 0.5
    size = torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)].to(device)
    x = (shared + 0.5 * draw(2 * n, n, generator, device)) * size
    return x.T @ x / len(x)


def error(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """The layer's squared output error as a fraction of its squared output."""

    def energy(w: Tensor) -> float:
        return float(((w @ hessian) * w).sum(dtype=torch.float64))

    return energy(before - after) / energy(before)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
