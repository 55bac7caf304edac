"""Types of command-line arguments. Each raises ArgumentTypeError, which says what is allowed."""

import argparse
import re

from ctp.cells.inputs import MOST
from ctp.common.messages import shown


def positive(text: str) -> int:
    """A whole number from 1."""
    if not re.fullmatch("[0-9]{1,10}", text) or not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a whole number from 1 to {MOST:,}")
    return int(text)


def uri(text: str) -> str:
    """A folder or an fsspec URI, as text."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a folder or an fsspec URI")
    return text


def number(text: str, what: str = "a number") -> float:
    """A number from 0; what: it is called in an error."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be {what}, from 0 to {MOST:,}")
    return value
