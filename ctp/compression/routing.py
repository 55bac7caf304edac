"""Hessians of the experts of a mixture: of the tokens routed to each, filled up where those are too few.

An expert's matrix of m inputs to which n < m tokens were routed has a Hessian without full rank, which would leave the
solver free in m - n directions that other texts use. It is solved with (n H + (m - n) A) / m instead, where A is the
Hessian of all tokens that reach the layer, for `down_proj` of what the expert makes of them: A alone for an expert
that no token was routed to, H alone from m tokens on.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

from torch import Tensor, nn

from ctp.architectures.experts import SplitExperts
from ctp.architectures.linears import matrix
from ctp.formats.artifact import Routing

HESSIAN_BYTES = 2**33  # held at a time, where one linear's does not take more
Group = Sequence[str]  # linears on one input, by name
Measure = Callable[[Sequence[Group]], tuple[list[Tensor], list[int]]]  # Hessians of groups, and how many tokens each


def expert_of(block: nn.Module, name: str) -> tuple[str, int, str] | None:
    """(the experts' module, expert, linear) of an expert's linear in a block whose experts are split; else None."""
    path, _, linear = name.rpartition(".")
    path, _, expert = path.rpartition(".")
    inside = expert.isdecimal() and isinstance(block.get_submodule(path), SplitExperts)
    return (path, int(expert), linear) if inside else None


def stages(block: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that may be compressed on the same inputs, in order: one each, but experts side by side."""

    def role(at: tuple[int, Group]) -> object:
        found = expert_of(block, at[1][0])
        return (found[0], found[2]) if found else at[0]

    return [[group for _, group in same] for _, same in groupby(enumerate(groups), role)]


def pieces(block: nn.Module, stage: Sequence[Group]) -> list[list[Group]]:
    """The stage in parts whose Hessians fit into HESSIAN_BYTES, last part first: a linear's input does not depend on
    those after it, so that every part sees what the whole stage would."""
    parts: list[list[Group]] = []
    room = 0
    for group in stage:
        size = 4 * int(matrix(block.get_submodule(group[0])).shape[1]) ** 2
        if not parts or size > room:
            parts.append([])
            room = HESSIAN_BYTES
        parts[-1].append(group)
        room -= size
    return parts[::-1]


def filled_up(
    block: nn.Module, groups: Sequence[Group], measure: Measure, prefix: str, routing: Routing
) -> list[Tensor]:
    """The Hessians of groups, those of experts that see too few tokens filled up; `routing` counts the tokens."""
    hessians, counts = measure(groups)
    few: dict[tuple[str, str], list[int]] = {}
    for i, (group, tokens) in enumerate(zip(groups, counts, strict=True)):
        if (found := expert_of(block, group[0])) is None:
            continue
        name = f"{prefix}.{found[0]}.{found[1]}"
        routing.tokens[name] = tokens
        if tokens < len(hessians[i]):
            few.setdefault((found[0], found[2]), []).append(i)
            routing.short[name] = tokens
    for (path, linear), places in few.items():
        same = linear != "down_proj"  # what comes first sees the same tokens in every expert
        whole = _of_all_tokens(block, path, [groups[i] for i in (places[:1] if same else places)], measure)
        for k, i in enumerate(places):
            n, m = counts[i], len(hessians[i])
            hessians[i].mul_(n / m).add_(whole[0 if same else k], alpha=1 - n / m)
    return hessians


def _of_all_tokens(block: nn.Module, path: str, groups: Sequence[Group], measure: Measure) -> list[Tensor]:
    experts = block.get_submodule(path)
    assert isinstance(experts, SplitExperts)
    experts.all_tokens = frozenset(int(group[0].split(".")[-2]) for group in groups)
    try:
        return measure(groups)[0]
    finally:
        experts.all_tokens = None
