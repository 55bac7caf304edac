"""How much of what compression lost a prompt wins back, of the evaluations of one run: for its summary."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from ctp.labels import slug
from ctp.methods import Dense
from ctp.plan import Plan
from ctp.spec import Evaluate, canonical, key
from ctp.store import Store, StoreError

METRIC = "ppl"


@dataclass(frozen=True)
class Recovery:
    """Perplexities of one evaluation: of the dense model, the compressed one, and the latter behind what was won."""

    name: str
    dense: float
    compressed: float
    prompted: float

    @property
    def share(self) -> float:
        """(compressed - prompted) / (compressed - dense): 1 is all that compression lost, negative made it worse."""
        return (self.compressed - self.prompted) / (self.compressed - self.dense)

    def __str__(self) -> str:
        numbers = f"{self.compressed:.2f} -> {self.prompted:.2f}, dense {self.dense:.2f}"
        return f"{100 * self.share:.0f} % of the perplexity lost ({numbers}): {self.name}"


def recoveries(plan: Plan, keys: Iterable[str], store: Store) -> list[Recovery]:
    """Of those evaluations that put something before a compressed model, where all three numbers are in the store and
    compression did lose something; the best first. What the store cannot tell now is left out."""
    evaluated = [n.cell for n in plan.nodes.values() if isinstance(n.cell, Evaluate) and n.cell.recovery is None]
    bare = {(key(c.target), _asked(c)): c for c in evaluated}
    dense = {(_model(c), _asked(c)): c for c in evaluated if isinstance(c.target.compression, Dense)}
    read = _reader(store)
    found = []
    for k in keys:
        cell = plan.nodes[k].cell
        if not isinstance(cell, Evaluate) or cell.recovery is None or isinstance(cell.target.compression, Dense):
            continue
        whole, before = dense.get((_model(cell), _asked(cell))), bare.get((key(cell.target), _asked(cell)))
        if whole is None or before is None:
            continue
        numbers = [read(c) for c in (whole, before, cell)]
        known = [n for n in numbers if n is not None]
        if len(known) == 3 and known[1] > known[0]:
            found.append(Recovery(slug(cell), *known))
    return sorted(found, key=lambda r: -r.share)


def _model(cell: Evaluate) -> str:
    return canonical(cell.target.model.model_dump(mode="json"))


def _asked(cell: Evaluate) -> str:
    return cell.measure.remembered("_asked", lambda: canonical(cell.measure.model_dump(mode="json")))


def _reader(store: Store) -> Callable[[Evaluate], float | None]:
    known: dict[str, float | None] = {}

    def read(cell: Evaluate) -> float | None:
        if key(cell) not in known:
            known[key(cell)] = None
            with suppress(StoreError, OSError):
                known[key(cell)] = store.manifest(cell)["metrics"].get(METRIC)
        return known[key(cell)]

    return read
