"""Checks that what a cell reads outside the store stays what its key names while the cell reads it.

Weights of a safetensors file may be mapped into memory: writing to the file changes the loaded model. So files are
compared before a cell, before what it learned is saved, and after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ctp.cells import Dense
from ctp.cells.cell import Cell, Compress
from ctp.cells.inputs import Pinned, Spec
from ctp.cells.runtime import location
from ctp.common.files import Changed, Stamp, changed, stamps
from ctp.data import documents, tasks
from ctp.models import adapters, sources

Files = Callable[[], Sequence[Path]]


class _Pinner(Protocol):
    """A module that knows the files of a thing, and whether they are still what is pinned."""

    def pinned_files(self, location: str, /) -> list[Path]: ...
    def check_pinned(self, location: str, revision: str, /) -> object: ...


_PINNERS: dict[str, _Pinner] = {
    "pin_model": sources, "checkpoint": sources, "pin_windows": documents, "adapter": adapters, "pin_task": tasks,
}  # fmt: skip


@dataclass(frozen=True)
class Reads:
    """Things outside the store by name: how to find their files, and the first stamps of these files."""

    seen: Mapping[str, tuple[Files, tuple[Stamp, ...]]]

    def check(self) -> None:
        """Raises Changed, in one sentence naming the file, where one was written to, added or removed since then."""
        for what, (files, before) in self.seen.items():
            try:
                now = stamps(files())
            except OSError as e:
                if not before:
                    continue  # it was never there, which its reader reports
                raise changed(what, f"{e.filename}: {e.strerror}") from e
            if odd := sorted(set(now) ^ set(before)):
                raise changed(what, f"{odd[0][0]} was written to while it was in use")


@contextmanager
def reading(cell: Cell, locations: Mapping[str, str]) -> Iterator[Reads]:
    """What the cell reads, compared with what is pinned, on the way in and on the way out.

    Raises Changed, instead of whatever error half a file may have caused.
    """
    reads = Reads({f"{_title(t)} {t.pinned_name}": _pinned(t, location(locations, t)) for t in _things(cell)})
    try:
        yield reads
    except Exception as e:
        try:
            reads.check()
        except Changed as why:
            raise why from e
        raise
    reads.check()


def _things(cell: Cell) -> list[Pinned]:
    """Every model, text, adapter, checkpoint and task that the cell itself reads; its inputs come from the store."""
    found = [t for name in type(cell).model_fields for t in _inside(getattr(cell, name))]
    if not isinstance(cell, Compress):
        found += [i.model for i in cell.inputs if isinstance(i, Compress) and isinstance(i.compression, Dense)]
    return list(dict.fromkeys(found))


def _inside(value: object) -> Iterator[Pinned]:
    if isinstance(value, Cell):
        return
    if isinstance(value, Pinned):
        yield value
    for name in type(value).model_fields if isinstance(value, Spec) else ():
        yield from _inside(getattr(value, name))


def _title(thing: Pinned) -> str:
    return {"pin_model": "the model", "pin_windows": "the text", "pin_task": "the task"}.get(
        thing.PINNED_BY, f"the {getattr(thing, 'method', 'file')}"
    )


def _pinned(thing: Pinned, place: str) -> tuple[Files, tuple[Stamp, ...]]:
    """How to find the files of a thing, and their stamps. Raises Changed if they are not what is pinned."""
    module = _PINNERS.get(getattr(thing, "method", "") if thing.PINNED_BY == "pin_path" else thing.PINNED_BY)
    if module is None:
        return tuple, ()
    before: tuple[Stamp, ...] = ()
    with suppress(OSError):  # a missing file, which the check reports
        before = stamps(module.pinned_files(place))
    module.check_pinned(place, thing.revision)
    return partial(module.pinned_files, place), before
