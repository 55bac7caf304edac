"""Which model, text or task of a grid stands where the paper has its own: the grid file's `define`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .paper import document
from .runs import AnalysisError

NAMED_BY = ("name", "dataset", "path")


class Roles:
    """The names that a grid has for the paper's roles. define: the grid file's, names of roles to settings."""

    def __init__(self, define: Mapping[str, Any] | None = None) -> None:
        self.define = dict(define or {})

    def names(self, role: str) -> set[str]:
        """What a run's params may call the thing in this role; the paper's own thing where the grid defines none."""
        if role in self.define:
            return set(self._spelled(self.define[role]))
        return {role, own_name(role)}

    def _spelled(self, value: Any) -> Iterable[str]:
        """A name as it was given, as a folder's last part, and as a YAML file's stem."""
        if isinstance(value, Mapping):
            value = next((value[n] for n in NAMED_BY if n in value), None)
        if isinstance(value, list):
            return [x for v in value for x in self._spelled(v)]
        if not isinstance(value, str):
            return []
        if value.startswith("$"):
            return self.names(value[1:])
        path = Path(value)
        return [value, path.name, *([path.stem] if path.suffix in (".yaml", ".yml") else [])]


def own_name(role: str) -> str:
    """What the paper's own model, text or task is called: a hub id, a data set, a task of the harness."""
    known = document()
    if role in known["models"]:
        return str(known["models"][role]["hub"])
    return str(known["tasks"][role]["harness"]) if role in known["tasks"] else role


def nearest(wanted: int, paper: Iterable[int], present: Iterable[int]) -> int | None:
    """The grid's number that stands for the paper's: itself, else, where both have as many, the one of its rank."""
    ours, theirs = sorted(set(present)), sorted(set(paper))
    if wanted in ours:
        return wanted
    return ours[theirs.index(wanted)] if len(ours) == len(theirs) else None


def of_grid(text: str) -> tuple[Roles, set[str]]:
    """The roles that a grid file's text defines, and its studies. Raises AnalysisError where it cannot be read."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise AnalysisError(f"the grid file kept in MLflow cannot be read: {' '.join(str(e).split())}") from e
    file = raw if isinstance(raw, dict) else {}
    return Roles(file.get("define")), set(file.get("studies") or {})
