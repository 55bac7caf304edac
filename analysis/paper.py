"""What the paper reports, as data: `analysis/paper.yaml`, read into one entry per measurement."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

METRIC = {"perplexity": "ppl", "task": "score", "latency": "prefill_seconds", "generation": "questions",
          "neighbours": "fraction_below_0.16", "learn": "trainable_parameters"}  # fmt: skip
HIGHER_IS_BETTER = {"score"}
IN_FRONT = {"soft_prompt", "hard_prompt"}


@dataclass(frozen=True, eq=False)
class PaperNumber:
    """One entry of a table or figure.

    where: the axes of the measurement that it is, in roles: measure, model, target, source (compressions as `level`
    calls them), recovery, k, rank, learned_on, dataset or task. value: None where the paper draws a point and prints no
    number. stderr: None where none is printed. printed: the number as it stands there. rounding: half a unit of its
    last digit. exact: the value is a count that must be met exactly.
    """

    table: str
    row: tuple[str, ...]
    column: str
    where: Mapping[str, Any]
    metric: str
    value: float | None = None
    stderr: float | None = None
    rounding: float = 0.0
    printed: str = "-"
    exact: bool = False

    @property
    def has_prompt(self) -> bool:
        """Do k positions stand in front that the paper's perplexity counts?"""
        return self.where.get("recovery") in IN_FRONT

    def digits(self, value: float | None) -> str:
        """A number of ours, with the digits that such a number is shown with."""
        if value is None:
            return "-"
        if self.exact:
            return f"{value:,.0f}"
        return f"{value:.3f}" if self.metric == "score" else f"{value:.2f}" if value < 100_000 else f"{value:.3g}"

    @property
    def name(self) -> str:
        """Table, row and column as one line."""
        return f"{self.table}: {', '.join((*self.row, self.column))}"


def level(method: str, bits: int | None, sparsity: float | None) -> str:
    """What the paper varies about a compression, as one word: dense, gptq-3bit, sparsegpt-62.5, sparsegpt-50-4bit."""
    kept = f"-{100 * sparsity:g}" if sparsity else ""
    return method + kept + (f"-{bits}bit" if bits else "")


@lru_cache
def document() -> dict[str, Any]:
    """The whole file; every scalar is a string, as it is printed."""
    loaded = yaml.load((Path(__file__).parent / "paper.yaml").read_text(), Loader=yaml.BaseLoader)
    assert isinstance(loaded, dict)
    return loaded


def tables() -> list[str]:
    """The names of all tables and figures."""
    return list(document()["tables"])


def spec(table: str) -> dict[str, Any]:
    """What the file says of one table or figure."""
    found = document()["tables"][table]
    assert isinstance(found, dict)
    return found


def protocol(name: str) -> int:
    """A number of the paper's protocol: k, seq_len, shots, lora_rank."""
    return int(document()["protocol"][name])


def title(role: str) -> str:
    """How a model, text or task is called in print."""
    for family in ("models", "datasets", "tasks"):
        if role in document()[family]:
            return str(document()[family][role]["title"])
    raise KeyError(role)


def entries(table: str) -> list[PaperNumber]:
    """Every entry of one table or figure, row by row; entries that the paper leaves empty (NA) are left out."""
    return list(_entries(table))


def _entries(table: str) -> Iterator[PaperNumber]:
    own = spec(table)
    columns = own["columns"]
    for row in own.get("rows", [{"label": []}]):
        values = iter(row.get("values", ["~"] * len(columns)))
        for column in columns:
            label = column.get("label") or title(next(iter(column.values())))
            settings = {n: v for n, v in {**own["where"], **row, **column}.items() if n not in ("label", "values")}
            if column.get("metric") == "trainable_parameters":
                if (number := _parameters(table, row, label, settings)) is not None:
                    yield number
                continue
            printed = next(values)
            if printed == "NA":
                continue
            where = _where(settings)
            base: dict[str, Any] = {"table": table, "row": tuple(row["label"]), "column": label, "where": where}
            yield PaperNumber(**base, metric=METRIC[where["measure"]], **_printed(printed))


def _where(settings: Mapping[str, str]) -> dict[str, Any]:
    """Axes of a measurement, from the shorthands `prompt` and `lora`."""
    out: dict[str, Any] = {n: v for n, v in settings.items() if n not in ("prompt", "lora", "source", "k")}
    learned_on = settings.get("lora", settings.get("prompt"))
    if learned_on is None:
        return out | ({"k": int(settings["k"])} if "k" in settings else {})
    if learned_on == "none":
        return out | {"recovery": "none", "k": 0}
    if learned_on == "hard":
        return out | {"recovery": "hard_prompt"}
    out |= {"learned_on": settings["dataset"] if learned_on == "direct" else learned_on}
    out |= {"source": settings.get("source", settings["target"])}
    if "lora" in settings:
        return out | {"recovery": "lora", "k": 0, "rank": protocol("lora_rank")}
    return out | {"recovery": "soft_prompt", "k": int(settings.get("k", protocol("k")))}


def _parameters(table: str, row: Mapping[str, Any], label: str, settings: Mapping[str, str]) -> PaperNumber | None:
    """The trainable parameters of a row of tables 6 and 7; None where nothing is learned."""
    learned = {n: v for n, v in settings.items() if n not in ("metric", "measure", "dataset")}
    where = _where({**learned, "measure": "learn"})
    known = document()["trainable_parameters"][where["model"]]
    if where.pop("recovery") == "none":
        return None
    kind = "lora" if "lora" in settings else "soft_prompt"
    del where["target"]
    base: dict[str, Any] = {"table": table, "row": tuple(row["label"]), "column": label}
    base |= {"where": where | {"recovery": kind}, "metric": "trainable_parameters", "exact": True}
    return PaperNumber(**base, value=float(known[kind]["exact"]), printed=f"{known[kind]['printed']} M")


def _printed(text: str) -> dict[str, Any]:
    """Value, standard error and rounding of a printed number, "0.410 0.022" or "7.1"; nothing for ~."""
    if text == "~":
        return {}
    value, _, stderr = text.partition(" ")
    exponent = Decimal(value).as_tuple().exponent
    assert isinstance(exponent, int)
    return {"value": float(value), "stderr": float(stderr) if stderr else None, "rounding": 0.5 * 10.0**exponent,
            "printed": text.replace(" ", " ± ")}  # fmt: skip
