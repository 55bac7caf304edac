"""Writes the map of CONTRIBUTING.md: every package and module with the first sentence of its docstring.

python -m tools.map
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "[//]: # (map: written by `make map`)\n", "[//]: # (end of the map)\n"
END_OF_SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z`])")  # not that of "Eq. (1)"


def page(text: str) -> str:
    """The page `text` with the map of the tree as it is. Raises ValueError where a module has no docstring."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "".join(lines()) + "\n" + END + rest.split(END)[1]


def lines() -> Iterator[str]:
    """A list of packages, those of ctp from the bottom layer to the top one, and below each its modules."""
    for folder in packages():
        files = sorted(folder.glob("*.py"))
        yield f"- `{folder.relative_to(ROOT)}/` {sentence(folder / '__init__.py')}\n"
        yield from (f"  - `{f.name}` {sentence(f)}\n" for f in files if f.name != "__init__.py")


def packages() -> Iterator[Path]:
    """Folders of modules. Raises ValueError where one is no package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    order = [name for layer in settings["contracts"][0]["layers"][::-1] for name in re.findall(r"\w+", layer)]
    for root in settings["root_packages"]:
        found = sorted({f.parent for f in (ROOT / root).rglob("*.py")}, key=lambda p: p.relative_to(ROOT).parts)
        inner = [f for f in found if f != ROOT / root]
        if root == "ctp":
            if unknown := [f for f in inner if f.name not in order]:
                raise ValueError(f"{unknown[0].relative_to(ROOT)} is not in the layers of pyproject.toml")
            inner.sort(key=lambda f: order.index(f.name))
            yield from (*inner, ROOT / root)
        else:
            yield from (ROOT / root, *inner)


def sentence(file: Path) -> str:
    """The first sentence of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text())) if file.exists() else None
    if not text:
        raise ValueError(f"{file.relative_to(ROOT)}: no docstring whose first sentence says what it is for")
    return " ".join(END_OF_SENTENCE.split(text.split("\n\n")[0])[0].split())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
