"""References to artifacts: kind, readable name and key, and from these the folder in a store."""

from dataclasses import dataclass

from ctp.cells.cell import Cell, key, to_json
from ctp.cells.labels import slug
from ctp.storage.manifest import Identity

DIGITS = 12  # of the key, at the end of a folder name
_NAME_BYTES = 150  # file systems allow 255 for a file name


@dataclass(frozen=True)
class Ref:
    """An artifact of a store. name: readable, of any length; key: 64 hex digits."""

    kind: str
    name: str
    key: str

    @property
    def folder(self) -> str:
        """The name of its folder. Raises ValueError where the name would leave that folder."""
        if "/" in self.name or "\0" in self.name:
            raise ValueError(f"{self.name!r}: a name with a slash or zero byte would leave its folder")
        return f"{self.name.encode()[:_NAME_BYTES].decode(errors='ignore')}-{self.key[:DIGITS]}"

    @property
    def path(self) -> str:
        """Its folder, relative to the store's root."""
        return f"{self.kind}/{self.folder}"


def split(folder: str) -> tuple[str, str]:
    """(readable name, first digits of the key) of a folder name."""
    name, _, digits = folder.rpartition("-")
    return name, digits


def ref(cell: Cell) -> Ref:
    """Where the cell's artifact is stored. Raises ValueError where a model, text or adapter is not pinned."""
    return cell.remembered("_ref", lambda: Ref(cell.kind, slug(cell), key(cell)))


def identity(cell: Cell) -> Identity:
    """What every manifest holds first: key, kind, spec, version, and the keys of the inputs."""
    return {"key": key(cell), **to_json(cell), "version": cell.VERSION, "inputs": [key(i) for i in cell.inputs]}
