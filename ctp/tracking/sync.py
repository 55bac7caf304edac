"""Brings a grid's experiment up to date with the store: writes what is missing, and ends what died."""

import random
from collections.abc import Iterable
from functools import partial

from mlflow.entities import Run

from ctp.storage.ref import Ref
from ctp.storage.store import Store
from ctp.tracking.entries import CURRENT, ERROR, KEY, KIND, LEFT_OUT, current_tags, fingerprint
from ctp.tracking.experiment import Experiment
from ctp.tracking.writer import Writer


def sync(writer: Writer, whole: bool, trust: bool) -> tuple[int, int]:
    """(runs written, runs ended that dead invocations had left). See `Tracker.sync`."""
    experiment, plan, store = writer.experiment, writer.plan, writer.store
    store.repair(plan.refs())
    done, orphans = store.done(plan.refs()), experiment.orphans()
    cells = fingerprint(plan.nodes[k] for k in done)
    mark = f"{'whole' if whole else 'part'} {cells}"
    if trust and not orphans and _is_marked(experiment, {mark, f"whole {cells}"}, done):
        experiment.checked = done
        return 0, 0
    written = _write_finished(writer, done)
    _end_cells(writer, orphans, done)
    written += _write_failures(writer, done)
    experiment.settle(experiment.created)
    written += _write_finished(writer, done & experiment.created)  # of doubles the other writer's may have stayed
    if whole:
        _retire(writer)
    if not writer.refused:  # else it is tried, and reported, again
        experiment.mark(mark)
    experiment.rebuilt = ""
    for run in orphans:  # last: as long as they are there, nothing is trusted
        if run.data.tags.get(KIND) == "grid":
            experiment.end_invocation(run)
    return written, len(orphans)


def _is_marked(experiment: Experiment, marks: set[str], done: set[str]) -> bool:
    """Does the experiment say that it was brought up to date with this, and is a cell drawn at random there?"""
    if experiment.rebuilt or experiment.synced not in marks:
        return False
    return not done or experiment.any(
        f"tags.`{KEY}` = '{random.choice(list(done))}' and attributes.status = 'FINISHED'"
    )


def _write_finished(writer: Writer, done: set[str]) -> int:
    """Finish the runs of finished cells that are not, and update the tags of the others."""
    written = 0
    for k, node in writer.plan.nodes.items():
        if k not in done or k in writer.experiment.checked:
            continue
        known = writer.experiment.runs().get(k)
        if known is None or known.status != "FINISHED":
            writer.cell(k, partial(writer.finish, k))
            written += k not in writer.refused
            continue
        writer.note_left_out(k, known.tags.get(LEFT_OUT, ""))
        for name, value in current_tags(node).items() - known.tags.items():
            writer.client.set_tag(known.run_id, name, value)
    return written


def _write_failures(writer: Writer, done: set[str]) -> int:
    """Fail the runs of cells whose last attempt failed, and that nobody is trying again now."""
    written = 0
    for k, error in writer.store.failures.all().items():
        if k in done or k not in writer.plan.nodes:
            continue
        known, node = writer.experiment.runs().get(k), writer.plan.nodes[k]
        if known is None or (known.status != "RUNNING" and known.tags.get(ERROR) != error[:5000]):
            writer.cell(k, partial(writer.runs.fail, node, error, _traceback(writer.store, node.ref)))
            written += 1
    return written


def _end_cells(writer: Writer, orphans: Iterable[Run], done: set[str]) -> None:
    """End the runs of cells that dead invocations worked on; those of finished cells are FINISHED by now."""
    left = {r.info.run_id: r.data.tags[KEY] for r in orphans if KEY in r.data.tags}
    writer.experiment.settle(set(left.values()))
    for k in set(left.values()):
        known = writer.experiment.runs()[k]
        if known.status == "RUNNING" and known.run_id in left:
            if k in done and k in writer.plan.nodes:
                writer.cell(k, partial(writer.finish, k))
            else:
                writer.runs.cut_off(k)


def _retire(writer: Writer) -> None:
    """Mark the runs of cells that left the grid."""
    for k, known in writer.experiment.runs().items():
        if k not in writer.plan.nodes and known.tags.get(CURRENT) == "yes":
            writer.client.set_tag(known.run_id, CURRENT, "no")


def _traceback(store: Store, ref: Ref) -> str:
    """Of the cell's last attempt; empty where it was cut off while it was written."""
    try:
        return store.failures.trace(ref)
    except (OSError, ValueError, KeyError):
        return ""
