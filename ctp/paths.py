"""Names that may be paths: the file system is asked whatever they hold, a name that no file can have included."""

from fnmatch import fnmatchcase
from pathlib import Path


def expanded(text: str | Path) -> Path:
    """The path, `~` replaced where there is such a user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def there(path: Path) -> bool:
    """Is there something at the path?"""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a null byte
        return False


def folder_named(text: str) -> Path | None:
    """The folder that a text names, None where there is none."""
    path = expanded(text)
    return path if text and there(path) and path.is_dir() else None


def matches(path: str, pattern: str) -> bool:
    """As a shell does: a * ends at the next slash."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
