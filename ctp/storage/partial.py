"""What a store keeps of cells that are not done: the last state of a prompt being learned, and why a try failed.

{root}/partial/{name}-{digits of the key}/step-…/  states, each a folder with a manifest
{root}/failed/{name}-{digits of the key}.json      the last error
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ctp.cells.cell import CellData
from ctp.storage.folders import Folders
from ctp.storage.manifest import MANIFEST, Identity, parse, verify
from ctp.storage.ref import Ref
from ctp.storage.remote import StoreError, room

PARTIAL, FAILED = "partial", "failed"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class States:
    """The states of what is being learned."""

    folders: Folders

    def save(self, ref: Ref, identity: Identity, step: int, write: Callable[[Path], object]) -> None:
        """Keep the state that `write(folder)` writes, as of `step`; older states go once it is safe."""
        target = f"{self.folder(ref)}/step-{step:09d}"
        with self.folders.workspace() as work:
            write(work)
            self.folders.commit(work, target, {**identity, "step": step})
        for path in self.steps(ref):
            if path < target:  # another driver may be further
                self.folders.remove(path)

    @contextmanager
    def newest(self, ref: Ref) -> Iterator[Path | None]:
        """A local copy of the newest whole state, or None."""
        for source in reversed(self.steps(ref)):
            with self.folders.workspace() as work:
                try:
                    path = f"{source}/{MANIFEST}"
                    manifest = parse(self.folders.read(path) or b"", path)
                    self.folders.download(source, manifest, work)
                    verify(work, manifest["files"])
                except (FileNotFoundError, StoreError):
                    continue  # torn while the machine died, or older by now: another one may be whole
                yield work
                return
        yield None

    def started(self) -> dict[str, int]:
        """Folder name -> the step reached, of every cell that was interrupted."""
        paths = (p.split("/")[-3:-1] for p in sorted(self.folders.glob(PARTIAL, f"*/step-*/{MANIFEST}")))
        return {name: int(found[1]) for name, step in paths if (found := _STEP.fullmatch(step))}

    def steps(self, ref: Ref) -> list[str]:
        """The folders of the states, the newest last."""
        found = self.folders.glob(f"{PARTIAL}/{ref.folder}", f"step-*/{MANIFEST}")
        return sorted(p.removesuffix(f"/{MANIFEST}") for p in found)

    def folder(self, ref: Ref) -> str:
        return f"{self.folders.root}/{PARTIAL}/{ref.folder}"


@dataclass(frozen=True)
class Failures:
    """Why the last try of a cell failed, until it is done."""

    folders: Folders

    def record(self, ref: Ref, spec: CellData, error: str, trace: str) -> None:
        """Keep an error; spec: the cell as plain data, for people who read the file."""
        record = {"key": ref.key, "error": error, "traceback": trace, "spec": spec}
        with room(self.folders.uri):
            self.folders.write(self._path(ref), json.dumps(record, indent=1).encode())

    def forget(self, ref: Ref) -> None:
        """Remove the record of a cell that is done."""
        with suppress(FileNotFoundError):
            self.folders.fs.rm_file(self._path(ref))

    def all(self) -> dict[str, str]:
        """key -> the last error, of every cell whose last try failed."""
        found = {}
        for path in self.folders.glob(FAILED, "*.json"):
            try:
                record = json.loads(self.folders.read(path) or b"")
                found[str(record["key"])] = str(record["error"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off while it was written: the cell is missing all the same
        return found

    def trace(self, ref: Ref) -> str:
        """The traceback of the last try. Raises OSError, ValueError or KeyError where there is none."""
        return str(json.loads(self.folders.fs.cat_file(self._path(ref)))["traceback"])

    def uri(self, ref: Ref) -> str:
        """The path or URI of the record."""
        path = self._path(ref)
        return path if self.folders.local else str(self.folders.fs.unstrip_protocol(path))

    def _path(self, ref: Ref) -> str:
        return f"{self.folders.root}/{FAILED}/{ref.folder}.json"
