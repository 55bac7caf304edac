"""Methods of users: Python files that a grid file names, run by the driver and, from their source, by workers."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from ctp.cells import Compression, Measure, Method, Recovery
from ctp.common.files import there
from ctp.common.messages import shown
from ctp.machine.contained import MethodEnded, contained
from ctp.planning.gridtext import beside


def read(given: object, folders: Sequence[Path], problems: list[str]) -> dict[str, str]:
    """name -> source of every file in `plugins`, loaded once so that its methods are known; mistakes go to `problems`.

    A name without .py is a module that is installed wherever cells run; its source is "".
    """
    out: dict[str, str] = {}
    for item in given if isinstance(given, list) else [] if given is None else [given]:
        place = f"plugins = {shown(item)}"
        if not isinstance(item, str) or not item:
            problems.append(f"{place}: the path of a .py file, or the name of an installed module")
            continue
        path = beside(item, folders)
        if item.endswith(".py") and not (there(path) and path.is_file()):
            problems.append(f"{place}: there is no such file, here or beside the grid file")
            continue
        name = path.stem if item.endswith(".py") else item
        if name in out:
            problems.append(f"{place}: two plugins are called {name}")
            continue
        try:
            out[name] = path.read_text("utf-8") if item.endswith(".py") else ""
            with contained():
                load({name: out[name]})
        except (Exception, SystemExit, MethodEnded) as e:  # whatever the file itself raises
            problems.append(f"{place}: {type(e).__name__}: {e}")
        problems += [f"{place}: {problem}" for problem in _undone(f"ctp_plugin_{name}" if out.get(name) else name)]
    return out


def _undone(module: str) -> list[str]:
    """Methods of a module that nothing does: without a function, and derived from no built-in method."""
    families: dict[type[Method], str] = {Compression: "compress", Recovery: "recover", Measure: "measure"}
    return [
        f"the method {name!r} needs a function {verb}(self, job)"
        for family, verb in families.items()
        for name, kind in family.registry.items()
        if kind.__module__ == module and not hasattr(kind, verb)
        and not any(b is not family and issubclass(b, family) and b.__module__.startswith("ctp.") for b in kind.__mro__)
    ]  # fmt: skip


_sources: dict[str, str] = {}


def load(sources: Mapping[str, str]) -> None:
    """Run every plugin that this process does not have yet, or has from another source."""
    for name, source in sources.items():
        if _sources.get(name) == source:
            continue
        if source:
            module = ModuleType(f"ctp_plugin_{name}")
            sys.modules[module.__name__] = module  # pydantic looks up annotations there
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
        else:
            importlib.import_module(name)
        _sources[name] = source
