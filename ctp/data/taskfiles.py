"""The YAML files that define tasks: found by name, and read without lm-evaluation-harness, which imports in seconds."""

import difflib
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ctp.common.files import expanded, there
from ctp.common.messages import shown

INSTALL = "tasks are read and run by lm-evaluation-harness: pip install 'ctp[tasks]'"


def harness_version() -> str:
    """Of the harness that is installed. Raises ValueError where there is none."""
    try:
        return version("lm_eval")
    except PackageNotFoundError as e:
        raise ValueError(INSTALL) from e


def user_file(name: str, base: Path | None) -> Path:
    """A task file of the user's, relative to `base` or the working directory. Raises ValueError if there is none."""
    given = expanded(name)
    for folder in (base, Path.cwd()):
        if folder is not None and there(folder / given) and (folder / given).is_file():
            return (folder / given).resolve()
    raise ValueError(f"there is no task file {shown(name)}" + (f", in {base} or here" if base is not None else ""))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with the harness's `!function module.name`, which stays text."""


class _Function(str):
    """`module.name`, relative to the folder of the YAML."""


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))


def merged(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """(settings, files) of a YAML with what it includes, as the harness merges it, Python files included."""
    if path in above:
        raise ValueError(f"{path} includes itself")
    try:
        settings = yaml.load(path.read_bytes(), _Loader)  # a safe loader
    except OSError as e:
        raise ValueError(f"{path} is missing on this machine") from e
    except yaml.YAMLError as e:
        raise ValueError(f"{path} is no YAML: {' '.join(str(e).split())}") from e
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: a task is a mapping of settings, not a {type(settings).__name__}")
    config: dict[str, Any] = {}
    files = [path, *_python_files(settings, path.parent)]
    includes = settings.pop("include", [])
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str):
            raise ValueError(f"include = {include!r} in {path}: must be the name of a file")
        fields, more = merged((path.parent / include).resolve(), (*above, path))
        config |= fields
        files += more
    return config | settings, files


def _python_files(value: Any, folder: Path) -> list[Path]:
    if isinstance(value, _Function):
        file = folder / (value.rpartition(".")[0].replace(".", "/") + ".py")
        return [file] if file.is_file() else []  # else a module that is installed
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [file for v in inner for file in _python_files(v, folder)]


_HEADS = re.compile(
    rb"""^["']?(task|group|tag)["']?[ ]*:[ ]*(?:["']?([^\s"'#\[]+)["']?[ ]*$|((?:\n[ ]*-[ ].*)+))""", re.M
)


@lru_cache
def _harness_names() -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Its tasks' files by name, and the known tasks of each group and tag; reads 14,000 files in a second."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(INSTALL)
    tasks: dict[str, Path] = {}
    groups: dict[str, list[str]] = {}
    for path in sorted((Path(spec.submodule_search_locations[0]) / "tasks").glob("**/*.yaml"), key=Path.as_posix):
        name = ""
        for kind, value, listed in sorted(_HEADS.findall(path.read_bytes()), reverse=True):  # `task` before `tag`
            names = [value.decode()] if value else [v.strip(" -\"'") for v in listed.decode().splitlines() if v]
            if kind == b"task" and value:
                name = names[0]
                tasks.setdefault(name, path)
            for group in names if kind != b"task" else ():
                groups.setdefault(group, []).extend([name] if kind == b"tag" and name else [])
    return tasks, groups


def harness_file(name: str) -> Path:
    """The file of one of the harness's tasks. Raises ValueError for other names, and for groups."""
    tasks, groups = _harness_names()
    if name in tasks:
        return tasks[name]
    if name in groups:
        within = sorted(groups[name]) or [t for t in sorted(tasks) if t.startswith(f"{name}_")]
        such = f", such as {', '.join(within[:3])}" if within else ""
        raise ValueError(f"{name} is a group of tasks: name single ones{such}")
    near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"unknown task {name!r}{hint} Allowed: those of lm-eval {harness_version()}, or a .yaml file")
