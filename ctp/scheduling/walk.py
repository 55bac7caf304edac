"""The walk over a plan's graph: which cells run together and when, and what a failure stops. Independent of Ray.

A task is what one worker does at a time: evaluations of one target, whose model is then loaded once; several short
cells of one sort; or one cell. A task takes no more than its share of the ready cells, so that no slot idles while
another has the rest (guided self-scheduling: Polychronopoulos and Kuck 1987).
"""

import heapq
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ctp.cells.cell import Cell, Compress, Evaluate, Learn, key
from ctp.cells.events import Done, Drained, Event, Failed, Skipped
from ctp.cells.labels import slug
from ctp.planning.cost import Cost
from ctp.planning.graph import Plan, heaviest_paths
from ctp.planning.resources import BUSY, alone
from ctp.planning.states import Outcome, runnable

WORKER_DIED = "its worker died (out of memory, or the machine went away) and so did the retries"
TASK_SECONDS = 3.0  # of short cells in one task: handing out a task takes some hundredths of a second
Rank = tuple[bool, float, int]  # runs alone, minus the work of its path, place in the plan: the least goes first


class Sort(NamedTuple):
    """Cells of one sort take about as long as each other. model: key of the artifact that stays loaded, if any."""

    kind: str
    model: str
    method: str


class Group(NamedTuple):
    """Cells of one group can share a task."""

    sort: Sort
    alone: bool
    resources: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Settings:
    """slots: tasks that run at once. resources: of each cell's task. weights: expected work of each cell in any unit,
    all alike where empty. ahead: tasks that may wait for a slot, None for any number. landed: is a cell in the store?
    reached: the step of its saved state."""

    slots: int
    resources: Mapping[str, dict[str, float]]
    weights: Mapping[str, float] = field(default_factory=dict)
    fail_fast: bool = False
    ahead: int | None = None
    landed: Callable[[str], bool] = lambda k: False
    reached: Callable[[str], int] = lambda k: 0


class Walk:
    """Hands out tasks whose inputs are done, and learns from events which cells that makes ready."""

    def __init__(
        self, plan: Plan, todo: set[str], done: set[str], settings: Settings, on_event: Callable[[Event], None]
    ) -> None:
        self.plan, self.settings, self.on_event = plan, settings, on_event
        self.weights = settings.weights or dict.fromkeys(plan.nodes, 1.0)
        self.order = _order(plan, self.weights)
        self.stopped = self.draining = False
        # Cells: what they came to, which wait and for what, and heaps of those that are ready.
        self.outcome, self.finished = Outcome(), set(done)
        self.skip(runnable(plan, todo, done))
        self.waiting = (todo & plan.nodes.keys()) - self.outcome.skipped.keys()
        self.needed_by = _needed_by(plan, self.waiting)
        self.missing = {k: len(set(n.inputs) - done) for k, n in plan.nodes.items()}
        self.ready: dict[Group, list[tuple[Rank, str]]] = {}
        # Tasks that are handed out, and those of them that have a slot: they have reported something.
        self.tasks: dict[str, list[str]] = {}
        self.running: set[str] = set()
        # What workers have shown: the model that the free one has loaded, times, saved steps when they died.
        self.free_model = ""
        self.seconds: dict[Sort, float] = {}
        self.steps: dict[str, int] = {}
        for k in self.waiting:
            self._offer(k)

    # ----------------------------------------------------------------- handing out

    def next_task(self, name: str) -> list[str]:
        """The cells of the next task, called `name` from now on; none where nothing is to start now."""
        if self.stopped or not self.ready or self._enough():
            return []
        group = self._best()
        if self._hold(self.ready[group][0][1]):
            return []
        task = self._take(group)
        self.waiting.difference_update(task)
        self.tasks[name] = task
        return task

    def _enough(self) -> bool:
        """Do as many tasks wait for a slot as may?"""
        free, ahead = max(self.settings.slots - len(self.running), 0), self.settings.ahead
        return ahead is not None and len(self.tasks) - len(self.running) >= free + ahead

    def _hold(self, k: str) -> bool:
        """Is it better to wait? Hours of learning do not start while the compression of a longer path still runs."""
        running = (i for task in self.tasks.values() for i in task if i not in self.finished)
        return self.weights[k] >= BUSY and any(
            isinstance(self.plan.nodes[i].cell, Compress) and self.order[i] < self.order[k] for i in running
        )

    def _best(self) -> Group:
        """The group of the next task: the first in order or, as good as that, what the free worker has loaded."""
        first = min(self.ready, key=lambda g: self.ready[g][0])
        loaded, self.free_model = self.free_model, ""
        kind, rank = first.sort.kind, self.ready[first][0][0]
        compared = 1 if kind == Evaluate.kind else 2  # evaluations of any work rank alike
        for group, cells in self.ready.items():
            if group.sort[:2] == (kind, loaded) and cells[0][0][:compared] == rank[:compared]:
                return group
        return first

    def _take(self, group: Group) -> list[str]:
        """The first cells of a group, as many as one task shall have."""
        cells, taken = self.ready[group], 0.0
        task: list[str] = []
        count, work = self._share(group)
        while cells and len(task) < count and taken < work:
            k = heapq.heappop(cells)[1]
            task.append(k)
            taken += self.weights[k]
        if not cells:
            del self.ready[group]
        # Evaluations of one prompt follow each other: its keys and values are computed once.
        turn = {inputs: i for i, inputs in enumerate(dict.fromkeys(self.plan.nodes[k].inputs for k in task))}
        return sorted(task, key=lambda k: turn[self.plan.nodes[k].inputs])

    def _share(self, group: Group) -> tuple[float, float]:
        """(cells, work) at which the group's next task is full."""
        if group.sort.kind == Evaluate.kind:
            work = sum(self.weights[k] for cells in self.ready.values() for _, k in cells)
            return math.inf, work / self.settings.slots
        fair = math.ceil(sum(map(len, self.ready.values())) / (2 * self.settings.slots))
        return min(fair, max(1, TASK_SECONDS // max(self.seconds.get(group.sort, math.inf), 1e-3))), math.inf

    def _offer(self, k: str) -> None:
        """Put a waiting cell among the ready ones, if it is."""
        if self.missing[k] == 0:
            cell = self.plan.nodes[k].cell
            group = Group(_sort(cell), alone(cell), tuple(sorted(self.settings.resources[k].items())))
            heapq.heappush(self.ready.setdefault(group, []), (self.order[k], k))

    # ----------------------------------------------------------------- what comes back

    def receive(self, name: str, event: Event) -> None:
        """Take in an event of a cell of the task."""
        self.running.add(name)
        if isinstance(event, Drained):
            return
        if event.key in self.finished or (event.key in self.outcome.failed and not isinstance(event, Done)):
            return  # Tune repeats a trial's last report, and a retry what the first try reported
        if isinstance(event, Done):
            self._done(event)
        self.on_event(event)
        if isinstance(event, Failed):
            self._fail(event)

    def _done(self, event: Done) -> None:
        k = event.key
        sort = _sort(self.plan.nodes[k].cell)
        if event.seconds is not None:
            self.seconds[sort] = 0.8 * self.seconds.get(sort, event.seconds) + 0.2 * event.seconds
        self.finished.add(k)
        self.outcome.done.add(k)
        self.outcome.failed.pop(k, None)
        for waiting in self.needed_by[k]:
            self.missing[waiting] -= 1
            if waiting in self.waiting:
                self._offer(waiting)

    def end(self, name: str, error: bool = False, message: str = "") -> None:
        """The task is over; error: its worker died, of which Ray says `message`."""
        task = self.tasks.pop(name, [])
        self.running.discard(name)
        self.free_model = _sort(self.plan.nodes[task[-1]].cell).model if task and not error else ""
        if error:
            self._worker_died(task, message)

    def _worker_died(self, task: list[str], message: str) -> None:
        """Cells are done in turn, so the worker died on the first that is not done: that one has failed, unless it has
        learned on since its last death (machines die). The others go to another worker."""
        left = [k for k in task if k not in self.finished and k not in self.outcome.failed]
        for k in [k for k in left if self.settings.landed(k)]:
            left.remove(k)
            self._done(Done(k))
            self.on_event(Done(k))
        if self.draining or not left:
            return
        again = left if self._went_on(left[0]) else left[1:]
        self.waiting.update(again)
        for k in again:
            self._offer(k)
        if left[0] not in again:
            reason = death(message)
            event = Failed(left[0], reason, message or reason, died=True)
            self.on_event(event)
            self._fail(event)

    def _went_on(self, k: str) -> bool:
        """Has the cell a later saved state than when its worker and the retries died before?"""
        before, self.steps[k] = self.steps.get(k, 0), self.settings.reached(k)
        return self.steps[k] > before

    def drain(self) -> None:
        """Hand out nothing more: the run is to stop. What is cut off is neither failed nor done."""
        self.stopped = self.draining = True

    def _fail(self, event: Failed) -> None:
        self.outcome.failed[event.key] = event.error
        self.stopped = self.stopped or self.settings.fail_fast
        blocked: dict[str, str] = {}
        behind = [event.key]
        for i in behind:  # grows: all that needs it, however far behind
            for waiting in self.needed_by[i]:
                if waiting in self.waiting and waiting not in blocked:
                    blocked[waiting] = f"needs {slug(self.plan.nodes[i].cell)}"
                    behind.append(waiting)
        self.waiting.difference_update(blocked)
        self.skip(blocked)

    def skip(self, blocked: Mapping[str, str]) -> None:
        """These cells are not going to run, for these reasons."""
        self.outcome.skipped.update(blocked)
        for k, reason in blocked.items():
            self.on_event(Skipped(k, reason))


def without_commands(message: str) -> str:
    """Ray's message without the command lines of the machine's other processes, which may hold secrets."""
    return re.sub(r"Top \d+ memory users:.*?(?=\nFailure # |\Z)", "", message, flags=re.DOTALL)


def ended_for_memory(message: str) -> int:
    """How often Ray ended the worker because its machine ran low on memory."""
    return message.count("killed due to the node running low on memory")


def death(message: str) -> str:
    """Why a worker died, as far as Ray's message tells."""
    if not ended_for_memory(message):
        return WORKER_DIED
    use = re.findall(r"Memory on the node \(IP: ([^,)]*).*?\) was (\S+) used / (\S+) limit", message)
    where = " on {}, where {} of {} were in use,".format(*use[-1]) if use else ""
    return (f"out of memory: Ray ended its worker{where} and its retries, which feed fewer windows at "
            "once; could help: more --cpus a cell, --recompute or --packed for learning, a larger machine")  # fmt: skip


def _order(plan: Plan, weights: Mapping[str, float]) -> dict[str, Rank]:
    paths = heaviest_paths(plan, weights)
    return {k: (alone(n.cell), -paths[k][0], i) for i, (k, n) in enumerate(plan.nodes.items())}


def _needed_by(plan: Plan, waiting: set[str]) -> dict[str, list[str]]:
    """Of each cell, the waiting cells that it is an input of."""
    found: dict[str, list[str]] = {k: [] for k in plan.nodes}
    for k in waiting:
        for i in set(plan.nodes[k].inputs):
            found[i].append(k)
    return found


def _sort(cell: Cell) -> Sort:
    if isinstance(cell, Compress):  # no model stays loaded
        return Sort(cell.kind, "", f"{cell.compression.method} {cell.model.name}")
    return Sort(cell.kind, key(cell.base), cell.recovery.method if isinstance(cell, Learn) else "")


def expected(plan: Plan, costs: Mapping[str, Cost]) -> dict[str, float]:
    """Weights of a walk: each cell's operations by the cost model, and those of reading its model once."""
    return {k: costs[k].flops + n.facts.parameters for k, n in plan.nodes.items()}
