"""A plugin that tells what a process is at, one line a moment, and lingers there: whoever wants to kill it can aim.

It changes no number: what runs is ctp, a little slower. Driver and workers load it because the grid file names it.
"""

import os
import sys
import time
from functools import wraps

WORKER = sys.argv[0].endswith("default_worker.py")
FILE = os.environ.get("CTP_FAULTS_FILE")


def say(stage, linger=0.03):
    """Append "pid role stage"; one write is whole, however many processes do it."""
    line = f"{os.getpid()} {'worker' if WORKER else 'driver'} {stage}\n"
    file = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)
    time.sleep(linger)


def before(owner, name, stage, linger=0.03):
    """Say `stage` whenever `name` of a module or class is called; a function may make the stage of its arguments."""
    real = getattr(owner, name)

    @wraps(real)
    def call(*args, **how):
        say(stage(*args) if callable(stage) else stage, linger)
        return real(*args, **how)

    setattr(owner, name, call)


def after(owner, name, stage):
    """Say `stage` whenever `name` has returned."""
    real = getattr(owner, name)

    @wraps(real)
    def call(*args, **how):
        found = real(*args, **how)
        say(stage)
        return found

    setattr(owner, name, call)


def watch_worker():
    from ctp.execution import execute, jobs
    from ctp.learning import run
    from ctp.storage import folders, objects, partial

    before(execute, "execute", "begin")
    before(jobs.Job, "progress", "compress")
    before(run.Run, "update", lambda run: f"learn {run.state.step}", linger=0.01)
    before(partial.States, "save", "checkpoint")
    for owner in (folders.Folders, objects.Objects):
        before(owner, "commit", "publish")
        after(owner, "commit", "published")
    before(jobs, "evaluating", "evaluate")


def watch_driver():
    from ctp.scheduling import cluster, tune
    from ctp.tracking import cell_runs, experiment, sync, tracker

    say("plan")
    before(experiment, "_open", "open")
    before(tracker.Tracker, "begin", "invocation")
    before(cluster, "_connect", "ray")
    before(tune.GraphSearch, "suggest", "hand-out", linger=0)
    before(cell_runs.CellRuns, "finish", "log")
    after(cell_runs.CellRuns, "_create", "log")
    before(cell_runs.CellRuns, "start", "log")
    before(tracker.Tracker, "close", "close")
    before(sync, "_retire", "close")


if FILE:
    watch_worker() if WORKER else watch_driver()
