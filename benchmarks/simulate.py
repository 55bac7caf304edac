"""A grid's run on GPUs, simulated: the real `GraphSearch` of ctp hands out the tasks, only the clock is made up.

Stated assumptions, in place of Ray and CUDA:

- A task is placed as Ray places a placement group of one bundle: on the machine with most free GPUs, a part of a GPU
  on the fullest GPU that has room; tasks that find no room wait, later ones that fit pass them.
- A cell first holds its place without computing (process, model, texts: `hold`), then computes. Cells that compute on
  one GPU at the same time share its speed evenly.
- A cell that is given several GPUs, as its model does not fit into one, is as fast as on one: its layers follow one
  another.
- Handing out takes no time, nothing fails.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ray.tune.search import Searcher

from ctp.cells.events import Done, Started
from ctp.planning import cost
from ctp.planning.graph import Plan
from ctp.scheduling.tune import GraphSearch
from ctp.scheduling.walk import Settings, expected

Bundle = Mapping[str, float]
Segments = Sequence[tuple[float, float]]
EPS = 1e-9


@dataclass(frozen=True)
class Machines:
    """`number` equal machines of so many GPUs and cores each."""

    number: int
    gpus: int
    cpus: int


@dataclass
class Task:
    """What one trial does. machine: its number; gpus: which of that machine's. begun, ended: seconds of the run."""

    trial: str
    cells: list[str]
    bundle: Bundle
    machine: int = -1
    gpus: tuple[int, ...] = ()
    begun: float = 0.0
    ended: float = 0.0
    left: list[list[float]] = field(default_factory=list)  # of each cell that has not ended: [hold, compute]


@dataclass(frozen=True)
class Run:
    """wall: seconds in all. busy: GPU-seconds with at least one cell on the GPU. tasks: in the order of their ends."""

    wall: float
    busy: float
    tasks: list[Task]


def simulate(plan: Plan, bundles: Mapping[str, Bundle], machines: Machines, slots: int,
             segments: Callable[[list[str], int], Segments]) -> Run:  # fmt: skip
    """Run all cells of the plan. segments: (cells of a task, machine) -> (hold, compute) seconds of each.

    Raises ValueError where a cell fits no machine, or the search ends with cells that were not run.
    """
    weights = expected(plan, {k: cost.of(n.cell, n.facts) for k, n in plan.nodes.items()})
    settings = Settings(slots, {k: dict(b) for k, b in bundles.items()}, weights)
    search = GraphSearch(plan, set(plan.nodes), set(), settings, lambda event: None)
    floor, hand = _Floor(machines), _Hand(search, slots)
    running: list[Task] = []
    ended: list[Task] = []
    now = busy = 0.0
    while True:
        while placed := hand.place(floor):
            for task in placed:
                task.begun, task.left = now, [list(s) for s in segments(task.cells, task.machine)]
                search.on_trial_result(task.trial, {"events": [Started(task.cells[0])]})
            running += placed
        if not running:
            break
        step = _advance(running)
        now, busy = now + step, busy + step * floor.used()
        for task in [t for t in running if not _report(search, t)]:
            running.remove(task)
            task.ended = now
            floor.give(task)
            ended.append(task)
    if hand.waiting or search.outcome.done != set(plan.nodes):
        raise ValueError(f"no machine of {machines} has {hand.waiting[0].bundle if hand.waiting else 'what is left'}")
    return Run(now, busy, ended)


class _Hand:
    """Tasks that the search has given and no machine has: one more than `slots`, as `tune.run` sets Tune."""

    def __init__(self, search: GraphSearch, slots: int) -> None:
        self.search, self.slots = search, slots
        self.waiting: list[Task] = []
        self.count, self.more = 0, True

    def place(self, floor: "_Floor") -> list[Task]:
        """Ask for tasks and place those that there is room for."""
        while self.more and len(self.waiting) <= self.slots:
            suggested = self.search.suggest(str(self.count))
            self.more = suggested != Searcher.FINISHED
            if not isinstance(suggested, dict):
                break
            cells = [c["key"] for c in json.loads(suggested["cells"])]
            self.waiting.append(Task(str(self.count), cells, suggested["bundle"]))
            self.count += 1
        placed = [t for t in self.waiting if floor.take(t)]
        self.waiting = [t for t in self.waiting if t not in placed]
        return placed


def _advance(running: list[Task]) -> float:
    """Let time pass until the first segment ends; returns the seconds."""
    computing: dict[tuple[int, int], int] = {}
    for task in running:
        for place in _places(task):
            computing[place] = computing.get(place, 0) + (task.left[0][0] <= 0)
    speeds = [
        1.0 if t.left[0][0] > 0 else 1.0 / max((computing[place] for place in _places(t)), default=1) for t in running
    ]
    step = min(t.left[0][t.left[0][0] <= 0] / speed for t, speed in zip(running, speeds, strict=True))
    for task, speed in zip(running, speeds, strict=True):
        part = int(task.left[0][0] <= 0)
        left = task.left[0][part] - step * speed
        task.left[0][part] = left if left > EPS * max(1.0, step) else 0.0
    return step


def _places(task: Task) -> list[tuple[int, int]]:
    return [(task.machine, gpu) for gpu in task.gpus]


def _report(search: GraphSearch, task: Task) -> bool:
    """Tell the search of every cell that has ended; is there one left?"""
    while task.left and sum(task.left[0]) <= 0:
        search.on_trial_result(task.trial, {"events": [Done(task.cells[-len(task.left)])]})
        task.left.pop(0)
        if task.left:
            search.on_trial_result(task.trial, {"events": [Started(task.cells[-len(task.left)])]})
    if not task.left:
        search.on_trial_complete(task.trial)
    return bool(task.left)


class _Floor:
    """What is free of every machine."""

    def __init__(self, machines: Machines) -> None:
        self.gpus = [[1.0] * machines.gpus for _ in range(machines.number)]
        self.cpus = [float(machines.cpus)] * machines.number

    def used(self) -> int:
        return sum(free < 1 for machine in self.gpus for free in machine)

    def take(self, task: Task) -> bool:
        """Place the task; False where no machine has room."""
        cpus, share = task.bundle.get("CPU", 0.0), task.bundle.get("GPU", 0.0)
        for machine in sorted(range(len(self.gpus)), key=lambda m: -sum(self.gpus[m])):
            chosen = _choose(self.gpus[machine], share)
            if self.cpus[machine] < cpus or chosen is None:
                continue
            task.machine, task.gpus = machine, chosen
            self._change(task, -1)
            return True
        return False

    def give(self, task: Task) -> None:
        self._change(task, 1)

    def _change(self, task: Task, sign: int) -> None:
        self.cpus[task.machine] += sign * task.bundle.get("CPU", 0.0)
        for gpu in task.gpus:
            self.gpus[task.machine][gpu] += sign * min(1.0, task.bundle["GPU"])


def _choose(free: list[float], share: float) -> tuple[int, ...] | None:
    """Which GPUs of a machine: whole ones, or the fullest that has the share; None where there is no room."""
    if share > 1:
        whole = [i for i, f in enumerate(free) if f == 1][: math.ceil(share)]
        return tuple(whole) if len(whole) == math.ceil(share) else None
    if share <= 0:
        return ()
    room = [(f, i) for i, f in enumerate(free) if f >= share]
    return (min(room)[1],) if room else None
