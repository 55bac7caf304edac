"""Pinning: while a grid is validated, every model, text and adapter gets the exact revision that is there now."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

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
from ctp.models.sources import UNPINNED, Facts, known_models
from ctp.planning.gridtext import GridError, beside

Fields = dict[str, object]  # of a pinned thing, as they stand in the grid file


class Found(NamedTuple):
    """What a name stands for now: its short name, its exact revision, and where it is stored."""

    name: str
    revision: str
    location: str


class Pins:
    """The validation context of a grid: resolves names to revisions and remembers where each is stored.

    data_dir: a folder with local copies of texts (also CTP_DATA_DIR), preferred to the hub. provisional: for planning
    only: where the hub cannot be reached, texts and known models get the revision "unpinned" and their names go into
    `unpinned`; otherwise that raises ValueError. Raises GridError where there is no folder `data_dir`.

    The methods `pin_…` get a name and all fields given with it, and return the fields with short name and revision.
    They raise ValueError, in one sentence, where there is no such thing, or not at the given revision.
    """

    def __init__(self, data_dir: str | None = None, provisional: bool = False) -> None:
        if data_dir is not None and folder_named(data_dir) is None:
            raise GridError([f"--data {shown(data_dir)}: there is no such folder"])
        self.data_dir = data_dir
        self.folders: list[Path] = []  # of the grid file and what it extends: paths may be relative to them
        self.provisional = provisional
        self.unpinned: list[str] = []
        self.locations: dict[str, str] = {}
        self.datasets: dict[str, Fields] = {}  # descriptions of texts that are not built in
        self._corpora: dict[str, Corpus] = {}
        self._answers: dict[tuple[str, str, str], Found | ValueError] = {}

    def add_datasets(self, raw: object) -> list[str]:
        """Register the `datasets` of a grid file; returns its mistakes."""
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

    def pin_model(self, name: str, fields: Fields) -> Fields:
        """Also its dtype, where that is left to the checkpoint."""
        revision = _revision(fields)

        def find_model() -> Found:
            found = Found(*sources.locate(name, revision))
            if found.location.startswith("hub:") and not self.provisional:
                hub.check_access(name, found.revision)  # now, and not hours later on a worker
            return found

        found = self._found("model", name, revision, find_model, f"hub:{name}" if name in known_models() else None)
        known = model_facts(found.location, found.revision)
        check_usable(found.location, found.revision, known.vocab)
        dtype = fields.get("dtype", "auto")
        dtype = known.dtype if dtype == "auto" else dtype
        return {**fields, "name": found.name, "revision": found.revision, "dtype": dtype}

    def pin_path(self, path: str, fields: Fields) -> Fields:
        """An adapter or a checkpoint; also what is read from its files."""
        method, revision = str(fields["method"]), _revision(fields)
        locate, read = (adapters.locate, _adapter) if method == "adapter" else (sources.locate, _checkpoint)
        try:
            found = self._found(method, path, revision, lambda: Found(*locate(path, revision)))
            known = read(found.location, found.revision)
        except ValueError as e:
            raise ValueError(f"path = {shown(path)}: {e}") from e
        for field, value in known.items():
            if fields.get(field, value) != value:
                raise ValueError(f"{field} = {fields[field]!r}: {found.name} has {value!r}")
        return {**fields, "path": found.name, "revision": found.revision, **known}

    def pin_task(self, name: str, fields: Fields) -> Fields:
        """A task of lm-evaluation-harness."""
        given = fields.get("shots")
        shots = given if isinstance(given, int) else 0  # anything else is refused by validation

        def find_task() -> Found:
            from ctp.data import tasks  # finds the harness's files: where a grid names a task only

            path = str(beside(name, self.folders)) if name.endswith((".yaml", ".yml")) else name
            return Found(*tasks.locate(path, self.data_dir, shots=shots))

        try:
            found = self._found(f"task with {shots} shots", name, _revision(fields), find_task, "")
        except ValueError as e:
            raise ValueError(f"name = {shown(name)}: {e}") from e
        return {**fields, "name": found.name, "revision": found.revision}

    def pin_windows(self, name: str, fields: Fields) -> Fields:
        """Also `join`. A missing split is left to validation."""
        split, join = fields.get("split"), fields.get("join")
        corpus = find(name, self._corpora, self.data_dir)
        if corpus.path and name not in self.datasets:
            self.datasets[name] = {"path": corpus.path}  # a folder among the local data
        if not isinstance(split, str):
            return fields

        def find_text() -> Found:
            location, revision = locate_text(corpus, split, self.data_dir)
            return Found(name, revision, location)

        revision = _revision(fields)
        found = self._found(f"text {split}", name, "", find_text, f"hub:{corpus.hub}@{UNPINNED}")
        _check_revision(revision, found, f"{name} {split}")
        return {**fields, "revision": found.revision, "join": corpus.join if join is None else join}

    def _found(
        self, what: str, name: str, revision: str, find: Callable[[], Found], offline: str | None = None
    ) -> Found:
        """What `find` gives or raises, called once a grid; its location is noted.

        offline: the location to plan with where the hub cannot be reached; None where there is no planning without it.
        """
        question = (what, name, revision)
        if question not in self._answers:
            self._answers[question] = self._ask(name, find, offline)
        found = self._answers[question]
        if isinstance(found, ValueError):
            raise found
        if not found.location.startswith("hub:"):  # the hub was asked for this very revision
            _check_revision(revision, found, found.name)
        self.locations[f"{found.name}@{found.revision}"] = found.location
        return found

    def _ask(self, name: str, find: Callable[[], Found], offline: str | None) -> Found | ValueError:
        try:
            return find()
        except ValueError as e:
            if not isinstance(e, hub.Unreachable) or not self.provisional or offline is None:
                return e
        if name not in self.unpinned:
            self.unpinned.append(name)
        return Found(name, UNPINNED, offline)

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


def _adapter(location: str, revision: str) -> Fields:
    """The fields of an adapter that its files tell."""
    return asdict(adapters.adapter_facts(adapters.fetch(location, revision)))


def _checkpoint(location: str, revision: str) -> Fields:
    """The fields of a checkpoint that its files tell."""
    from ctp.formats import checkpoint  # torch takes seconds to import: where a grid names a checkpoint only

    checkpoint.quantization(checkpoint.fetch(location, revision, weights=False))
    known = model_facts(location, revision)
    return {"parameters": known.parameters, "width": known.width}


def _revision(fields: Fields) -> str:
    """The revision that is given, "" where none is."""
    given = fields.get("revision")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"revision = {shown(given)}: must be text, a commit or a hash")
    return given or ""


def _check_revision(given: str, found: Found, name: str) -> None:
    if given and found.revision not in (given, UNPINNED):
        raise ValueError(f"revision = {shown(given)}: {name} is {found.revision} here")
