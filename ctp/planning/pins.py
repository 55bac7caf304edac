"""Pinning: while a grid is validated, every model, text and adapter gets the exact revision that is there now."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ctp.cells.inputs import Model
from ctp.cells.runtime import location
from ctp.common import hub
from ctp.common.files import folder_named
from ctp.common.messages import shown
from ctp.data import specials
from ctp.data.documents import locate_text
from ctp.data.texts import Corpus, find, parse_corpus
from ctp.models import adapters, sources, tiny
from ctp.models.config import model_facts
from ctp.models.load import check_usable
from ctp.models.sources import Facts, known_models
from ctp.planning.gridtext import GridError, beside


def _adapter_fields(location: str, revision: str) -> dict[str, Any]:
    return asdict(adapters.adapter_facts(adapters.fetch(location, revision)))


def _checkpoint_fields(location: str, revision: str) -> dict[str, Any]:
    from ctp.formats import checkpoint  # torch takes seconds to import: where a grid names a checkpoint only

    checkpoint.quantization(checkpoint.fetch(location, revision, weights=False))
    known = model_facts(location, revision)
    return {"parameters": known.parameters, "width": known.width}


# Methods with a `path`: (path, revision) -> (short name, revision, location), and the fields that are read from there.
PATHS: dict[str, tuple[Callable[[str, str], tuple[str, str, str]], Callable[[str, str], dict[str, Any]]]] = {
    "adapter": (adapters.locate, _adapter_fields),
    "checkpoint": (sources.locate, _checkpoint_fields),
}


class Pins:
    """The validation context of a grid: resolves names to revisions and remembers where each one lies.

    data_dir: a folder with local copies of texts (also CTP_DATA_DIR), preferred to the hub. provisional: for planning
    only: where the hub cannot be reached, texts and known models get the revision "unpinned" and their names go into
    `unpinned`; otherwise that raises ValueError. Raises GridError where there is no folder `data_dir`.
    """

    def __init__(self, data_dir: str | None = None, provisional: bool = False) -> None:
        if data_dir is not None and folder_named(data_dir) is None:
            raise GridError([f"--data {shown(data_dir)}: there is no such folder"])
        self.data_dir = data_dir
        self.folders: list[Path] = []  # of the grid file and what it extends: paths may be relative to them
        self.provisional = provisional
        self.unpinned: list[str] = []
        self.locations: dict[str, str] = {}
        self.datasets: dict[str, dict[str, Any]] = {}  # descriptions of texts that are not built in
        self._corpora: dict[str, Corpus] = {}
        self._found: dict[tuple[str, ...], tuple[str, str, str] | ValueError] = {}
        self._texts: dict[tuple[str, str], tuple[str, str]] = {}

    def add_datasets(self, raw: Any) -> list[str]:
        """Register a grid file's own `datasets`; returns what is wrong with them."""
        if not isinstance(raw, Mapping):
            return [f"datasets = {shown(raw)}: a mapping of names to descriptions"]
        problems = []
        for name, description in raw.items():
            try:
                self._corpora[str(name)] = parse_corpus(str(name), description)
                self.datasets[str(name)] = dict(description)
            except ValueError as e:
                problems.append(f"datasets.{name}: {e}")
        return problems

    def pin_model(self, data: dict[str, Any]) -> dict[str, Any]:
        """Fill in revision, dtype and the short name. Raises ValueError where there is no such model."""
        name, revision, location = self._locate("model", self._find_model, data["name"], data.get("revision"))
        known = model_facts(location, revision)
        check_usable(location, revision, known.vocab)
        dtype = data.get("dtype", "auto")
        return {**data, "name": name, "revision": revision, "dtype": known.dtype if dtype == "auto" else dtype}

    def _find_model(self, name: str, revision: str) -> tuple[str, str, str]:
        try:
            short, found, location = sources.locate(name, revision)
        except hub.Unreachable:
            if not self.provisional or name not in known_models():
                raise
            return name, self._unpinned(name), f"hub:{name}"
        if location.startswith("hub:") and not self.provisional:
            hub.check_access(name, found)  # now, and not hours later on a worker
        return short, found, location

    def _unpinned(self, name: str) -> str:
        if name not in self.unpinned:
            self.unpinned.append(name)
        return sources.UNPINNED

    def pin_path(self, data: dict[str, Any]) -> dict[str, Any]:
        """Fill in revision, short name and what is read from a method's `path`. Raises ValueError naming the field."""
        locate, read = PATHS[data["method"]]
        try:
            name, revision, location = self._locate(data["method"], locate, data["path"], data.get("revision"))
            fields = read(location, revision)
        except ValueError as e:
            raise ValueError(f"path = {shown(data['path'])}: {e}") from e
        for field, value in fields.items():
            if data.get(field, value) != value:
                raise ValueError(f"{field} = {data[field]!r}: {name} has {value!r}")
        return {**data, "path": name, "revision": revision, **fields}

    def _locate(
        self, what: str, locate: Callable[[str, str], tuple[str, str, str]], name: str, revision: Any
    ) -> tuple[str, str, str]:
        """What `locate` gives, asked once a grid and remembered for `location`."""
        _check_revision(revision)
        asked = (what, name, revision or "")
        if asked not in self._found:
            try:
                self._found[asked] = locate(name, revision or "")
            except ValueError as e:
                self._found[asked] = e  # asked once, told alike wherever it stands
        known = self._found[asked]
        if isinstance(known, ValueError):
            raise known
        name, found, location = known
        if revision and revision != found and not location.startswith("hub:"):
            raise ValueError(f"revision = {shown(revision)}: {name} is {found} here")
        self.locations[f"{name}@{found}"] = location
        return name, found, location

    def pin_task(self, data: dict[str, Any]) -> dict[str, Any]:
        """Fill in revision and short name of a task of lm-evaluation-harness. Raises ValueError where there is none."""
        from ctp.data import tasks  # finds the harness's files: where a grid names a task only

        shots = data.get("shots", 0)

        def locate(name: str, _: str) -> tuple[str, str, str]:
            own = name.endswith((".yaml", ".yml"))
            try:
                return tasks.locate(str(beside(name, self.folders)) if own else name, self.data_dir, shots=shots)
            except hub.Unreachable:
                if not self.provisional:
                    raise
                return name, self._unpinned(name), ""

        try:
            name, revision, _ = self._locate(f"task with {shots} shots", locate, data["name"], data.get("revision"))
        except ValueError as e:
            raise ValueError(f"name = {shown(data['name'])}: {e}") from e
        return {**data, "name": name, "revision": revision}

    def pin_windows(self, data: dict[str, Any]) -> dict[str, Any]:
        """Fill in revision and join. Raises ValueError on an unknown text or split, or a missing file."""
        name, split = data["dataset"], data.get("split")
        corpus = find(name, self._corpora, self.data_dir)
        if corpus.path and name not in self.datasets:
            self.datasets[name] = {"path": corpus.path}  # a folder among the local data
        if not isinstance(split, str):
            return data  # the missing split is validation's to report
        _check_revision(data.get("revision"))
        if (name, split) not in self._texts:
            self._texts[name, split] = self._find_text(corpus, split)
        location, revision = self._texts[name, split]
        if data.get("revision") and revision != sources.UNPINNED and data["revision"] != revision:
            raise ValueError(f"revision = {shown(data['revision'])}: {name} {split} is {revision} here")
        self.locations[f"{name}@{revision}"] = location
        join = corpus.join if data.get("join") is None else data["join"]
        return {**data, "revision": revision, "join": join}

    def _find_text(self, corpus: Corpus, split: str) -> tuple[str, str]:
        try:
            return locate_text(corpus, split, self.data_dir)
        except hub.Unreachable:
            if not self.provisional:
                raise
            revision = self._unpinned(corpus.name)
            return f"hub:{corpus.hub}@{revision}", revision

    def facts(self, model: Model) -> Facts:
        """Size and limits of a pinned model."""
        return model_facts(location(self.locations, model), model.revision)

    def specials(self, model: Model) -> specials.Specials | None:
        """The special tokens of a pinned model's tokenizer; None where it is a known model's, which has all, or the
        hub cannot be reached. Raises ValueError where it cannot be loaded."""
        place = location(self.locations, model)
        if place.removeprefix("hub:") in known_models() or place.startswith(tiny.SCHEME):
            return None
        try:
            return specials.of_model(place, model.revision)
        except hub.Unreachable:
            if not self.provisional:
                raise
            return None


def _check_revision(given: Any) -> None:
    if given is not None and not isinstance(given, str):
        raise ValueError(f"revision = {shown(given)}: must be text, a commit or a hash")
