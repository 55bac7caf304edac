"""The walk over a plan's graph: which cells are handed out together and when, and what a failure does. No Ray here.

A task is what one worker does at a time: the evaluations of one target, whose model is then loaded once; several short
cells of one sort; else one cell. A task never takes more than its share of what is ready, so that no slot idles while
another has all the rest (guided self-scheduling: Polychronopoulos and Kuck 1987).
"""

import heapq
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ctp.cells.cell import Cell, Compress, Evaluate, Learn, key
from ctp.cells.labels import slug
from ctp.planning.cost import Cost
from ctp.planning.graph import Plan, heaviest_paths
from ctp.planning.resources import BUSY, alone
from ctp.planning.states import Outcome, runnable

WORKER_DIED = "its worker died (out of memory, or the machine went away) and so did the retries"
TASK_SECONDS = 3.0  # of short cells in one task: handing out a task takes some hundredths of a second
Event = dict[str, Any]
Group = tuple[Any, ...]


class Walk:
    """Hands out tasks whose inputs are done, and learns from events what that makes ready.

    slots: how many tasks run at once. resources: what each cell's task takes. weights: expected work of each cell, in
    any unit, to go by the longest path and to share evenly; all alike where it is None. landed: is a cell done, though
    its worker could not tell? reached: the step of a cell's saved state. ahead: how many tasks may wait for a slot;
    None leaves that to the caller.
    """

    def __init__(self, plan: Plan, todo: set[str], done: set[str], slots: int,
                 resources: Mapping[str, dict[str, float]], on_event: Callable[[Event], None], fail_fast: bool, *,
                 weights: Mapping[str, float] | None = None, landed: Callable[[str], bool] = lambda k: False,
                 reached: Callable[[str], int] = lambda k: 0, ahead: int | None = None) -> None:  # fmt: skip
        self.plan, self.slots, self.resources, self.on_event = plan, slots, resources, on_event
        self.fail_fast, self.stopped, self.landed, self.ahead = fail_fast, False, landed, ahead
        self.reached, self.draining = reached, False
        self.steps: dict[str, int] = {}  # cell -> the step it had reached when its workers had died last
        self.weights = weights or dict.fromkeys(plan.nodes, 1.0)
        self.outcome = Outcome()
        self.skip(runnable(plan, todo, done))
        self.waiting = {k for k in plan.nodes if k in todo and k not in self.outcome.skipped}
        self.finished = set(done)
        self.tasks: dict[str, list[str]] = {}
        self.heard: set[str] = set()  # tasks that have told something: they have a slot
        self.free_model = ""  # what the worker that became free last holds
        self.seconds: dict[Group, float] = {}  # sort of cell -> what one takes, of late
        paths = heaviest_paths(plan, self.weights)
        self.order = {k: (alone(n.cell), -paths[k][0], i) for i, (k, n) in enumerate(plan.nodes.items())}
        self.needed_by: dict[str, list[str]] = {k: [] for k in plan.nodes}
        self.missing = dict.fromkeys(plan.nodes, 0)
        self.ready: dict[Group, list[tuple[tuple[bool, float, int], str]]] = {}
        self.ready_cells, self.ready_weight = 0, 0.0
        for k in self.waiting:
            for i in set(plan.nodes[k].inputs):
                self.needed_by[i].append(k)
                self.missing[k] += i not in self.finished
        for k in self.waiting:
            self._offer(k)

    # ----------------------------------------------------------------- handing out

    def next_task(self, name: str) -> list[str]:
        """The cells of the next task, called `name` from now on; none where nothing is to be started now."""
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
        running = len(self.heard)
        return self.ahead is not None and len(self.tasks) - running >= max(self.slots - running, 0) + self.ahead

    def _hold(self, k: str) -> bool:
        """Is it better to wait? Hours of learning are not begun while the compression of a longer path still runs."""
        running = (i for task in self.tasks.values() for i in task if i not in self.finished)
        return self.weights[k] >= BUSY and any(
            isinstance(self.plan.nodes[i].cell, Compress) and self.order[i] < self.order[k] for i in running
        )

    def _best(self) -> Group:
        """Where the next task comes from: the first in order or, as good as that, what the free worker has loaded."""
        first = min(self.ready, key=lambda g: self.ready[g][0])
        held, self.free_model = self.free_model, ""
        kind, rank = first[0], self.ready[first][0][0][:2]
        for group, cells in self.ready.items():
            rivals = rank[:1] == cells[0][0][:1] if kind == Evaluate.kind else rank == cells[0][0][:2]
            if group[:2] == (kind, held) and rivals:
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
        self.ready_cells -= len(task)
        self.ready_weight -= taken
        if not cells:
            del self.ready[group]
        # Target and prompt: what a prompt is asked comes in a row, and its rows go through the model once.
        turn = {inputs: i for i, inputs in enumerate(dict.fromkeys(self.plan.nodes[k].inputs for k in task))}
        return sorted(task, key=lambda k: turn[self.plan.nodes[k].inputs])

    def _share(self, group: Group) -> tuple[float, float]:
        """The most cells, and the work at which it is full, of the group's next task."""
        if group[0] == Evaluate.kind:
            return math.inf, self.ready_weight / self.slots
        each = self.seconds.get(group[:3], math.inf)
        return min(math.ceil(self.ready_cells / (2 * self.slots)), max(1, TASK_SECONDS // max(each, 1e-3))), math.inf

    def _offer(self, k: str) -> None:
        """Put a waiting cell among the ready ones, if it is."""
        if self.missing[k] == 0:
            heapq.heappush(self.ready.setdefault(self._group(k), []), (self.order[k], k))
            self.ready_cells += 1
            self.ready_weight += self.weights[k]

    def _group(self, k: str) -> Group:
        """What cells of one task have in common: kind, loaded model, method (of evaluations any), and resources."""
        cell = self.plan.nodes[k].cell
        return *_sort(cell), alone(cell), tuple(sorted(self.resources[k].items()))

    # ----------------------------------------------------------------- what comes back

    def hear(self, name: str, event: Event) -> None:
        """A cell of the task started, went on, ended or failed."""
        self.heard.add(name)
        k, what = event["key"], event["event"]
        if what == "drained":
            return
        if k in self.finished or (what != "done" and k in self.outcome.failed):
            return  # Tune repeats a trial's last report, and a retry repeats what the first try told
        if what == "done":
            self._done(k, event.get("seconds"))
        self.on_event(event)
        if what == "failed":
            self._fail(k, event["error"])

    def _done(self, k: str, seconds: float | None) -> None:
        sort = _sort(self.plan.nodes[k].cell)
        if seconds is not None:
            self.seconds[sort] = 0.8 * self.seconds.get(sort, seconds) + 0.2 * seconds
        self.finished.add(k)
        self.outcome.done.add(k)
        self.outcome.failed.pop(k, None)
        for waiting in self.needed_by[k]:
            self.missing[waiting] -= 1
            if waiting in self.waiting:
                self._offer(waiting)

    def end(self, name: str, error: bool = False, last_words: str = "") -> None:
        """The task is over; error: its worker died, of which Ray says `last_words`. Then only the cell that it died on
        has failed: the first that is not done, as they are done in turn. The others go to another worker, and so does a
        prompt that has learned on since: it does not kill them, machines die."""
        task = self.tasks.pop(name, [])
        self.heard.discard(name)
        self.free_model = _sort(self.plan.nodes[task[-1]].cell)[1] if task and not error else ""
        left = [k for k in task if k not in self.finished and k not in self.outcome.failed] if error else []
        for k in [k for k in left if self.landed(k)]:
            left.remove(k)
            self._done(k, None)
            self.on_event({"event": "done", "key": k})
        if self.draining:
            return
        others = left if left and self._went_on(left[0]) else left[1:]
        self.waiting.update(others)
        for k in others:
            self._offer(k)
        if left and left[0] not in others:
            reason = death(last_words)
            event = {"event": "failed", "key": left[0], "error": reason, "traceback": last_words or reason}
            self.on_event({**event, "died": True})
            self._fail(left[0], reason)

    def _went_on(self, k: str) -> bool:
        """Has the cell a later saved state than when its worker and the retries had died before?"""
        before, self.steps[k] = self.steps.get(k, 0), self.reached(k)
        return self.steps[k] > before

    def drain(self) -> None:
        """Hand out nothing more: the run shall stop. What is cut off is neither failed nor done."""
        self.stopped = self.draining = True

    def _fail(self, k: str, error: str) -> None:
        self.outcome.failed[k] = error
        self.stopped = self.stopped or self.fail_fast
        blocked: dict[str, str] = {}
        behind = [k]
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
            self.on_event({"event": "skipped", "key": k, "error": reason})


def own_words(words: str) -> str:
    """Without the command lines of the machine's other processes, which may hold what is nobody's business."""
    return re.sub(r"Top \d+ memory users:.*?(?=\nFailure # |\Z)", "", words, flags=re.DOTALL)


def ended_for_memory(words: str) -> int:
    """How often Ray ended the worker because its machine ran low on memory."""
    return words.count("killed due to the node running low on memory")


def death(words: str) -> str:
    """Why a worker died, where Ray knows more than that it did."""
    if not ended_for_memory(words):
        return WORKER_DIED
    use = re.findall(r"Memory on the node \(IP: ([^,)]*).*?\) was (\S+) used / (\S+) limit", words)
    where = " on {}, where {} of {} were in use,".format(*use[-1]) if use else ""
    return (f"out of memory: Ray ended its worker{where} and its retries, which feed fewer windows at "
            "once; could help: more --cpus a cell, --recompute or --packed for learning, a larger machine")  # fmt: skip


def _sort(cell: Cell) -> Group:
    """(kind, model that is loaded, method): cells of one sort take about as long as each other."""
    if isinstance(cell, Evaluate):
        return cell.kind, key(cell.target), ""
    if isinstance(cell, Learn):
        return cell.kind, key(cell.source), cell.recovery.method
    assert isinstance(cell, Compress)
    return cell.kind, "", f"{cell.compression.method} {cell.model.name}"  # it loads the whole model, and keeps nothing


def expected(plan: Plan, costs: Mapping[str, Cost]) -> dict[str, float]:
    """Weights of a walk: each cell's operations by the cost model, and those of reading its model once."""
    return {k: costs[k].flops + n.facts.parameters for k, n in plan.nodes.items()}
