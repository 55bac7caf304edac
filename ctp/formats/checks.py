"""What the readers of other tools' checkpoints share: a loop over the linears, and checks of settings and tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctp.architectures.linears import all_finite
from ctp.formats.layer import Layer
from ctp.machine.arithmetic import dtype_name

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int32, torch.int64)
Layers = Iterator[tuple[str, Layer, set[str]]]  # of each linear: its name, its compressed form, names of its tensors


def read_layers(
    tensors: Mapping[str, Tensor], fields: Sequence[str], format: str, read: Callable[[str, dict[str, Tensor]], Layer]
) -> Layers:
    """Every linear NAME of a checkpoint with a tensor `NAME.{fields[0]}`.

    read: makes a layer of the linear's name and its tensors by field. Raises ValueError naming the linear.
    """
    for name in [key.removesuffix(f".{fields[0]}") for key in tensors if key.endswith(f".{fields[0]}")]:
        linear = {field: tensors[f"{name}.{field}"] for field in fields if f"{name}.{field}" in tensors}
        try:
            yield name, read(name, linear), {f"{name}.{field}" for field in linear}
        except (ValueError, RuntimeError) as e:
            raise ValueError(f"{name}: no {format} layer: {e}") from e


def check_setting(field: str, value: Any, allowed: Sequence[Any], of: str = "") -> None:
    """Raises ValueError naming a setting of a checkpoint that is none of the allowed ones. of: " of FORMAT"."""
    if value not in allowed:
        raise ValueError(f"{field} = {value!r}{of}: allowed: {', '.join(map(str, allowed))}")


def check_group_size(size: Any, of: str = "", whole: str = ", or -1") -> None:
    """Raises ValueError where a group size is no number above 0. whole: names what else is allowed, -1 by default."""
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and not (whole and size == -1)):
        raise ValueError(f"group_size = {size!r}{of}: should be a whole number above 0{whole}")


def unless_centred(zero: Tensor, bits: int) -> Tensor | None:
    """Zero points, or None where all are the middle of the grid, as `Layer` has it for symmetric ones."""
    return None if bool((zero == 2 ** (bits - 1)).all()) else zero.contiguous()


def part(
    tensors: Mapping[str, Tensor], field: str, dtypes: Sequence[torch.dtype], shape: Sequence[int | None]
) -> Tensor:
    """The tensor `field` of a layer. Raises ValueError naming it where it is missing, has another dtype or shape (None:
    any length above 0), or holds numbers that are not finite.
    """
    if field not in tensors:
        raise ValueError(f"{field} is missing")
    found = tensors[field]
    if found.dtype not in dtypes:
        raise ValueError(f"{field} is {dtype_name(found.dtype)}: should be {' or '.join(map(dtype_name, dtypes))}")
    fits = found.dim() == len(shape) and all(
        have > 0 if want is None else have == want for have, want in zip(found.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{field} has the shape {tuple(found.shape)}: should be ({wanted})")
    if found.is_floating_point() and not all_finite(found):
        raise ValueError(f"{field} holds numbers that are not finite")
    return found


def below(field: str, values: Tensor, top: int) -> Tensor:
    """Whole numbers from 0 to top - 1, as they are. Raises ValueError naming the first that is none of them."""
    if bool((odd := (values < 0) | (values >= top)).any()):
        raise ValueError(f"{field} holds {int(values[odd][0])}: should be 0 to {top - 1}")
    return values


def group_numbers(field: str, tensors: Mapping[str, Tensor], columns: int, size: int) -> Tensor | None:
    """The group of every input, int32 (columns,); None where groups are runs of equal length in the inputs' order.

    size: inputs per group, of which the last may have fewer. Raises ValueError unless every group has so many.
    """
    regular = torch.arange(columns) // size
    groups = int(regular[-1]) + 1
    found = below(field, part(tensors, field, INTS, (columns,)), groups) if field in tensors else regular
    counts = torch.bincount(found.long(), minlength=groups)
    if bool((odd := counts != torch.bincount(regular, minlength=groups)).any()):
        at = int(odd.nonzero()[0])
        raise ValueError(
            f"{field} puts {int(counts[at])} inputs into group {at} of {groups}: should be groups of {size}"
        )
    even = columns % groups == 0 and torch.equal(found.long(), torch.arange(columns) // (columns // groups))
    return None if even else found.to(torch.int32)
