"""Pinning: while a grid is validated, every model and text gets the exact revision that is there now."""

from collections.abc import Mapping
from typing import Any

from ctp import corpora, models
from ctp.methods import Model, Windows


class Pins:
    """The validation context of a grid: resolves names to revisions and remembers where each one lies.

    data_dir: a folder with local copies of texts (also CTP_DATA_DIR), preferred to the hub.
    """

    def __init__(self, data_dir: str | None = None) -> None:
        self.data_dir = data_dir
        self.locations: dict[str, str] = {}
        self.datasets: dict[str, dict[str, Any]] = {}  # descriptions of texts that are not built in
        self._corpora: dict[str, corpora.Corpus] = {}
        self._models: dict[tuple[str, str], tuple[str, str, str]] = {}
        self._texts: dict[tuple[str, str], tuple[str, str]] = {}

    def add_datasets(self, raw: Any) -> list[str]:
        """Register a grid file's own `datasets`; returns what is wrong with them."""
        if not isinstance(raw, Mapping):
            return [f"datasets = {raw!r}: a mapping of names to descriptions"]
        problems = []
        for name, description in raw.items():
            try:
                self._corpora[str(name)] = corpora.parse_corpus(str(name), description)
                self.datasets[str(name)] = dict(description)
            except ValueError as e:
                problems.append(f"datasets.{name}: {e}")
        return problems

    def pin_model(self, data: dict[str, Any]) -> dict[str, Any]:
        """Fill in revision, dtype and the short name. Raises ValueError where there is no such model."""
        asked = (data["name"], data.get("revision", ""))
        if asked not in self._models:
            self._models[asked] = models.locate(*asked)
        name, revision, location = self._models[asked]
        if data.get("revision") and data["revision"] != revision and not location.startswith("hub:"):
            raise ValueError(f"revision = {data['revision']!r}: {name} is {revision} here")
        known = models.facts(location, revision)
        dtype = data.get("dtype", "auto")
        self.locations[f"{name}@{revision}"] = location
        return {**data, "name": name, "revision": revision, "dtype": known.dtype if dtype == "auto" else dtype}

    def pin_windows(self, data: dict[str, Any]) -> dict[str, Any]:
        """Fill in revision and join. Raises ValueError on an unknown text or split, or a missing file."""
        name, split = data["dataset"], data.get("split")
        corpus = corpora.find(name, self._corpora, self.data_dir)
        if corpus.path and name not in self.datasets:
            self.datasets[name] = {"path": corpus.path}  # a folder among the local data
        if not isinstance(split, str):
            return data  # the missing split is validation's to report
        if (name, split) not in self._texts:
            self._texts[name, split] = corpora.locate(corpus, split, self.data_dir)
        location, revision = self._texts[name, split]
        if data.get("revision") and data["revision"] != revision:
            raise ValueError(f"revision = {data['revision']!r}: {name} {split} is {revision} here")
        self.locations[f"{name}@{revision}"] = location
        join = corpus.join if data.get("join") is None else data["join"]
        return {**data, "revision": revision, "join": join}

    def facts(self, model: Model) -> models.Facts:
        """Size and limits of a pinned model."""
        return models.facts(self.locations[f"{model.name}@{model.revision}"], model.revision)


def location(locations: Mapping[str, str], thing: Model | Windows) -> str:
    """Where a pinned model or text lies. Raises KeyError naming it where the runtime does not say."""
    name = thing.name if isinstance(thing, Model) else thing.dataset
    return locations[f"{name}@{thing.revision}"]
