"""How a run uses its machines."""

from dataclasses import dataclass, field

from ctp.planning.resources import Resources


@dataclass(frozen=True)
class Options:
    """resources: of a trial. address: a Ray cluster to join, None for one on this machine alone. insecure: that cluster
    need not ask for a token. fail_fast: start nothing more after the first failure."""

    resources: Resources = field(default_factory=Resources)
    address: str | None = None
    insecure: bool = False
    fail_fast: bool = False
