"""Tasks of lm-evaluation-harness and in its YAML format, pinned to one definition, data and harness version.

`locate` pins a task when a grid is planned; `check_pinned` gives a worker what was pinned, or raises Changed. The
harness is not imported here, as that takes seconds.
"""

import glob
import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctp.common.files import cache_dir, changed, digest
from ctp.data.documents import hub_commit
from ctp.data.taskfiles import harness_file, harness_version, merged, user_file
from ctp.data.texts import local_root

BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # values of `dataset_path` for local files
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_HARNESS = "harness:"
# Of the paper's tasks. Other data sets are pinned to their present commit when a grid is planned.
COMMITS = {
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "baber/piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
}


@dataclass(frozen=True)
class Source:
    """Where a task is. task: `harness:NAME`, or the path of a YAML file. data: a folder with {split}.jsonl files, read
    instead of the data set that the definition names. commit: of its data set on the hub.
    """

    task: str
    data: str = ""
    commit: str = ""

    @property
    def title(self) -> str:
        return self.task.removeprefix(_HARNESS)


@dataclass(frozen=True)
class Task:
    """A task's definition: its name, YAML file, merged settings, and every file that it is made of.

    changes: settings to replace, so that the harness finds the pinned data. lacking: the split of the worked examples,
    if the local data does not have it. data: the local data files, by name. hub: the data set's id, if it is there.
    """

    name: str
    path: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    changes: dict[str, Any]
    lacking: str = ""
    data: tuple[tuple[str, Path], ...] = ()
    hub: str = ""

    def check_shots(self, shots: int) -> None:
        """Raise ValueError if the task cannot have `shots` worked examples."""
        if shots and self.config.get("num_fewshot") == 0:
            raise ValueError(f"shots = {shots}: the task {self.name} is defined without examples (num_fewshot: 0)")
        if shots and self.lacking:
            raise ValueError(f"shots = {shots}: the local data of {self.name} has no {self.lacking}.jsonl")


def locate(
    name: str, data_dir: str | Path | None = None, base: Path | None = None, shots: int = 0
) -> tuple[str, str, str]:
    """(short name, revision, location) of a task: a YAML file, relative to `base` or the working directory, or a name.

    A task of the harness reads `data_dir`/NAME/{split}.jsonl (default: $CTP_DATA_DIR) if that folder exists, else its
    data set's present commit on the hub. The revision is a hash of the definition's files, the data and the version.

    Raises ValueError, in one sentence: no such task, a group of tasks, data that cannot be pinned, no harness.
    """
    harness_version()
    if name.endswith((".yaml", ".yml")):
        source = Source(str(user_file(name, base)))
    else:
        root = local_root(data_dir)
        folder = root / name if root is not None else None
        source = Source(_HARNESS + name, str(folder) if folder is not None and folder.is_dir() else "")
    task = _define(source)
    if task.hub:
        kwargs = task.config.get("dataset_kwargs") or {}
        revision = kwargs.get("revision") or COMMITS.get(task.hub, "")
        commit = hub_commit(f"the task {task.name}", task.hub, revision, f"a folder {task.name}")
        source = replace(source, commit=commit)
    task.check_shots(shots)
    return task.name, _revision(source, task), json.dumps({n: v for n, v in asdict(source).items() if v})


def check_pinned(location: str, revision: str) -> Task:
    """The task that `locate` pinned. Raises Changed if it has changed since then, ValueError if it cannot be read."""
    source = Source(**json.loads(location))
    task = _define(source)
    if _revision(source, task, anew=True) != revision:
        why = f"its definition, its data or the harness, which is {harness_version()} here"
        raise changed(f"the task {task.name} ({source.title})", why)
    kwargs = task.changes.get("dataset_kwargs") or {}
    if "cache_dir" in kwargs:  # `datasets` tells files apart by path and time: a copy for each revision
        kwargs = {**kwargs, "cache_dir": f"{kwargs['cache_dir']}/{revision.removeprefix('sha256:')[:16]}"}
        task = replace(task, changes={**task.changes, "dataset_kwargs": kwargs})
    return task


def pinned_files(location: str) -> list[Path]:
    """The files of a task's definition, and its local data. Raises ValueError as `locate` does."""
    task = _define(Source(**json.loads(location)))
    return [*task.files, *(path for _, path in task.data)]


def _revision(source: Source, task: Task, anew: bool = False) -> str:
    parts = [f"lm-eval {harness_version()}", source.commit]
    parts += [digest([path], anew) for path in task.files]
    parts += [f"{label} {digest([path], anew)}" for label, path in task.data]
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _define(source: Source) -> Task:
    """The task of the files. Raises ValueError if it is no single task, or its data cannot be pinned."""
    path = harness_file(source.title) if source.task.startswith(_HARNESS) else Path(source.task)
    config, files = merged(path, ())
    for key, why in (
        ("group", "is a group of tasks: name single ones"),
        ("class", "is made by Python code, whose data cannot be pinned"),
        ("custom_dataset", "makes its data by Python code: it cannot be pinned"),
        ("unsafe_code", "runs code that the model writes: that is not done here"),
    ):
        if config.get(key):
            raise ValueError(f"the task {source.title} {why}")
    name = config.get("task")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{path}: task = {name!r} must be a name of letters, digits and . + - _")
    task = Task(name, path, config, tuple(dict.fromkeys(files)), {})
    if source.data:
        return _from_folder(task, Path(source.data))
    return _own_data(task, source.commit)


def _from_folder(task: Task, folder: Path) -> Task:
    """The task on a folder's {split}.jsonl. What is evaluated must be there; splits for examples may be missing."""
    named = {field: task.config[field] for field in SPLITS if task.config.get(field)}  # field -> split
    evaluated = named.get("test_split") or named.get("validation_split")
    given = (task.config.get("fewshot_config") or {}).get("split") or named.get("fewshot_split")
    there = {split: folder / f"{split}.jsonl" for split in (*named.values(), *([given] if given else []))}
    missing = [split for split, path in there.items() if not path.is_file()]
    for split in missing:
        if split in (evaluated, given):
            raise ValueError(f"the task {task.name} needs {split}.jsonl, and {folder} has none")
    found = {split: path for split, path in sorted(there.items()) if split not in missing}
    changes = _files("json", {split: _pattern(path) for split, path in found.items()})
    changes |= {field: None for field, split in named.items() if split in missing}
    examples = given or named.get("training_split") or named.get("validation_split") or ""  # the harness's order
    lacking = examples if examples in missing else ""
    return replace(task, changes=changes, lacking=lacking, data=tuple(found.items()))


def _own_data(task: Task, commit: str) -> Task:
    """The task on the data that its YAML names: local files, a local folder, or a data set of the hub at a commit."""
    path, kwargs = task.config.get("dataset_path"), dict(task.config.get("dataset_kwargs") or {})
    if not isinstance(path, str):
        raise ValueError(f"the task {task.name}: dataset_path = {path!r} must name a data set, a folder or a builder")
    if "://" in json.dumps(kwargs, default=str):
        raise ValueError(f"the task {task.name} reads files from the web, which cannot be pinned")
    folder = task.path.parent / path
    if path in BUILDERS:
        given = kwargs.get("data_files")
        if given is None or "data_dir" in kwargs:
            raise ValueError(f"the task {task.name}: dataset_path = {path!r} needs dataset_kwargs.data_files alone")
        parts = given if isinstance(given, dict) else {"train": given}  # datasets' name for files without one
        files = {n: [_data_file(task, f) for f in (v if isinstance(v, list) else [v])] for n, v in parts.items()}
        data = [(f"{split} {i}", file) for split, listed in files.items() for i, file in enumerate(listed)]
        local = {split: [_pattern(f) for f in listed] for split, listed in files.items()}
        changes = _files(path, local, kwargs, name=task.config.get("dataset_name"))
        return replace(task, changes=changes, data=tuple(data))
    if path.startswith((".", "/")) or folder.is_dir():
        found = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
        if not found:
            raise ValueError(f"the task {task.name}: dataset_path = {path!r}: there is no folder {folder} with files")
        changes = {"dataset_path": str(folder.resolve()), "dataset_kwargs": {**kwargs, "cache_dir": _arrow()}}
        return replace(task, changes=changes, data=tuple((f.relative_to(folder).as_posix(), f) for f in found))
    return replace(task, changes={"dataset_kwargs": {**kwargs, "revision": commit}}, hub=path)


def _data_file(task: Task, name: Any) -> Path:
    file = task.path.parent / str(name)
    if not file.is_file():
        raise ValueError(f"the task {task.name}: dataset_kwargs.data_files: there is no file {file}")
    return file.resolve()


def _pattern(path: Path) -> str:
    """The file as a pattern for `datasets`, with * ? [ escaped. Raises ValueError for "::", which chains there."""
    if "::" in str(path):
        raise ValueError(f"a task's data cannot be in a folder with '::' in its name: {path}")
    return glob.escape(str(path))


def _files(builder: str, files: Any, kwargs: dict[str, Any] | None = None, name: str | None = None) -> dict[str, Any]:
    kwargs = {**(kwargs or {}), "data_files": files, "cache_dir": _arrow()}
    return {"dataset_path": builder, "dataset_name": name, "dataset_kwargs": kwargs}


def _arrow() -> str:
    return str(cache_dir() / "datasets")  # its copies of local files
