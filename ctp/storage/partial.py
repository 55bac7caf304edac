"""What the store keeps of cells that are not done: the last state of a prompt being learned, why a try failed.

{root}/partial/{slug}-{key[:12]}/step-…/  states, each a folder with a manifest
{root}/failed/{slug}-{key[:12]}.json      the last error
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ctp.cells.cell import Cell, key, to_json
from ctp.cells.labels import slug
from ctp.storage.folders import Folders
from ctp.storage.manifest import MANIFEST, parse, verify
from ctp.storage.remote import StoreError

PARTIAL, FAILED = "partial", "failed"
_STEP = re.compile(r"step-(\d+)")


def folder_name(cell: Cell) -> str:
    """The name of the cell's folder: readable, and the first digits of its key. Raises ValueError on a bad name."""
    name = slug(cell).encode()[:150].decode(errors="ignore")  # file names end at 255 bytes
    if "/" in name or "\0" in name:
        raise ValueError(f"{name!r}: a name with a slash or zero byte would leave its folder")
    return f"{name}-{key(cell)[:12]}"


def identity(cell: Cell) -> dict[str, Any]:
    """What every manifest says first: the cell, its key and those of its inputs."""
    return {"key": key(cell), **to_json(cell), "version": cell.VERSION, "inputs": [key(i) for i in cell.inputs]}


class Unfinished(Folders):
    """States and failures of cells under a store's root."""

    # --------------------------------------------------------------------- states

    def save_partial(self, cell: Cell, step: int, write: Any) -> None:
        """Keep the state that `write(folder)` writes, as of `step`; older states go once it is safe."""
        base = self._partial(cell)
        with self.room(), self.workspace() as work:
            write(work)
            self.commit(work, f"{base}/step-{step:09d}", {**identity(cell), "step": step})
        for path in self._partial_steps(cell):
            if path < f"{base}/step-{step:09d}":  # another driver may be further
                self.remove(path)

    @contextmanager
    def partial(self, cell: Cell) -> Iterator[Path | None]:
        """A local copy of the newest whole saved state of the cell, or None."""
        for source in reversed(self._partial_steps(cell)):
            with self.room(), self.workspace() as work:
                try:
                    path = f"{source}/{MANIFEST}"
                    manifest = parse(self.read(path) or b"", path)
                    self.download(source, manifest, work)
                    verify(work, manifest["files"])
                except (FileNotFoundError, StoreError):
                    continue  # torn while the machine died, or older by now: another one may be whole
                yield work
                return
        yield None

    def started(self) -> dict[str, int]:
        """Folder name of a cell -> the step it had reached, of every cell that was interrupted."""
        paths = (p.split("/")[-3:-1] for p in sorted(self.glob(PARTIAL, f"*/step-*/{MANIFEST}")))
        return {name: int(found[1]) for name, step in paths if (found := _STEP.fullmatch(step))}

    def _partial(self, cell: Cell) -> str:
        return f"{self.root}/{PARTIAL}/{folder_name(cell)}"

    def _partial_steps(self, cell: Cell) -> list[str]:
        found = self.glob(f"{PARTIAL}/{folder_name(cell)}", f"step-*/{MANIFEST}")
        return sorted(p.removesuffix(f"/{MANIFEST}") for p in found)

    # ------------------------------------------------------------------- failures

    def record_failure(self, cell: Cell, error: str, trace: str) -> None:
        """Keep why the last try failed, for the next plan to say."""
        record = {"key": key(cell), "error": error, "traceback": trace, "spec": to_json(cell)}
        with self.room():
            self.write(self._failure(cell), json.dumps(record, indent=1).encode())

    def forget_failure(self, cell: Cell) -> None:
        """The cell is done: its old failure says nothing any more."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._failure(cell))

    def failure(self, cell: Cell) -> str:
        """The file that says why the last try of the cell failed, with the traceback: a path, or a URI."""
        return self._failure(cell) if self.local else str(self.fs.unstrip_protocol(self._failure(cell)))

    def failures(self) -> dict[str, str]:
        """key -> the last error, of every cell whose last try failed."""
        found = {}
        for path in self.glob(FAILED, "*.json"):
            try:
                record = json.loads(self.read(path) or b"")
                found[str(record["key"])] = str(record["error"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off while it was written: the cell is missing all the same
        return found

    def _failure(self, cell: Cell) -> str:
        return f"{self.root}/{FAILED}/{folder_name(cell)}.json"
