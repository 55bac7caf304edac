"""Stores reached over a network: failed requests are repeated with growing pauses, and each has a time limit."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem
from tenacity.stop import stop_base

from ctp.common.redact import scrub

PAUSES = (1.0, 4.0, 12.0, 30.0)  # seconds between five tries, each times 0.5 to 1.5 at random
PATIENCE = 60.0  # seconds after which a request is not tried again; files are, as one may take longer than that
SECONDS = {"cat_file": 60, "pipe_file": 60, "rm_file": 60, "info": 60, "makedirs": 60, "find": 600}  # of one try
FILES = ("put_file", "get_file", "cp_file")  # no limit: a store that has gone silent is noticed read by read
S3_RETRIES = 3  # of a part of a file, within one try
S3_CONFIG = {"connect_timeout": 10, "read_timeout": 20, "retries": {"mode": "standard", "total_max_attempts": 2}}

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUSY = (errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ENETUNREACH,
         errno.EHOSTUNREACH, errno.ENETDOWN, errno.ECONNRESET)  # fmt: skip
_LOST = {"ConnectionError", "TimeoutError", "HTTPClientError", "ClientPayloadError", "ClientConnectionError",
         "IncompleteRead", "ResponseParserError", "ResponseStreamingError", "ServiceRequestError"}  # fmt: skip


class StoreError(Exception):
    """The store cannot be reached or written, or what it holds is not what its manifest says."""

    def __init__(self, message: str) -> None:
        super().__init__(scrub(message))


def unreadable(path: str, e: OSError) -> StoreError:
    """The error for a file that may not be read: it may be whole, so nothing is moved or computed again."""
    why = e.strerror or type(e).__name__
    return StoreError(f"{path} cannot be read ({why}): make it readable, or remove it to have it computed again")


def connect(uri: str) -> tuple[Any, str, bool]:
    """(file system, root, whether it is a local folder) of a store's URI. Raises StoreError on a bad one."""
    s3 = uri.startswith(("s3://", "s3a://"))
    known = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    try:
        fs, root = fsspec.core.url_to_fs(uri, **({"config_kwargs": {**S3_CONFIG, **known}} if s3 else {}))
    except Exception as e:  # ValueError, ImportError, and whatever the client of a server raises
        raise StoreError(f"store {uri!r}: {e}") from e
    if isinstance(fs, LocalFileSystem):
        return fs, str(Path(root).resolve()), True
    if s3:
        fs.retries = S3_RETRIES
    return Retrying(fs, uri), root.rstrip("/"), False


class Retrying:
    """An fsspec file system whose requests are repeated where the store was away for a while, or too busy.

    What stays wrong becomes one StoreError that names the store and the last error.
    """

    def __init__(self, fs: Any, uri: str) -> None:
        self._fs, self._uri = fs, uri

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if name in SECONDS and self._fs.async_impl:  # fsspec's loop can end a request; others' clients have their own
            found = partial(found, timeout=SECONDS[name])
        return partial(self._request, name, found) if name in SECONDS or name in FILES else found

    def _request(self, name: str, request: Callable[..., Any], *args: Any, **how: Any) -> Any:
        stop: stop_base = tenacity.stop_after_attempt(len(PAUSES) + 1)
        tries = tenacity.Retrying(
            stop=stop if name in FILES else stop | tenacity.stop_after_delay(PATIENCE),
            wait=tenacity.wait_chain(*(tenacity.wait_random(p / 2, p * 1.5) for p in PAUSES)),
            retry=tenacity.retry_if_exception(lambda e: not _answer(e) and transient(e)),
            before=lambda _: self._fs.invalidate_cache() if name in ("find", "info") else None,  # others write too
            reraise=True,
        )
        begun = time.monotonic()
        try:
            return tries(request, *args, **how)
        except Exception as e:  # whatever the object store's client raises
            if _answer(e):
                raise
            error = f"{type(e).__name__}: {' '.join(str(e).split())}"[:500]
            if not transient(e):
                raise StoreError(f"store {self._uri!r}: {error}") from e
            number, seconds = tries.statistics["attempt_number"], f"{time.monotonic() - begun:.0f} s"
            tried = f"{number} tries in {seconds}" if number > 1 else seconds
            raise StoreError(f"store {self._uri!r} does not answer ({tried}): {error}") from e


def _answer(e: BaseException) -> bool:
    """Is this an answer that callers expect, rather than an error?"""
    return isinstance(e, FileNotFoundError | FileExistsError) or no_room(e) or unsupported(e)


def transient(e: BaseException) -> bool:
    """May the same request succeed a little later? True of timeouts, lost connections, and answers 408, 429 and 5xx."""
    if isinstance(e, PermissionError | ValueError | TypeError):
        return False
    if (status := _status(e)) is not None:
        return status in (408, 429) or (status >= 500 and status != 501)
    if (isinstance(e, OSError) and e.errno in _BUSY) or any(c.__name__ in _LOST for c in type(e).__mro__):
        return True
    return e.__cause__ is not None and transient(e.__cause__)


def unsupported(e: BaseException) -> bool:
    """Does the store not know this kind of request?"""
    return isinstance(e, NotImplementedError) or (isinstance(e, OSError) and e.errno == errno.ENOSYS)


def no_room(e: BaseException | None) -> bool:
    """Did this happen because a disk or a quota is full? Libraries in other languages say so in words only."""
    while e is not None:
        if (isinstance(e, OSError) and e.errno in FULL) or any(os.strerror(n) in str(e) for n in FULL):
            return True
        e = e.__cause__ or e.__context__
    return False


@contextmanager
def room(uri: str) -> Iterator[None]:
    """What fails in here because a disk is full becomes one StoreError that says so."""
    try:
        yield
    except Exception as e:
        if isinstance(e, StoreError) or not no_room(e):
            raise
        raise StoreError(
            f"no room left for the store {uri!r} or this machine's temporary files ({type(e).__name__}: {e}); "
            "nothing half-written was kept: make room and run the same command again, it goes on from here"
        ) from e


def _status(e: BaseException) -> int | None:
    """The HTTP status that the client's exception carries: botocore's answer, or an attribute of other clients."""
    answer = getattr(e, "response", None) or getattr(e.__cause__, "response", None)
    if isinstance(answer, dict):
        found: Any = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = next((v for n in ("status", "status_code", "code") if isinstance(v := getattr(e, n, None), int)), None)
    return found if isinstance(found, int) and 100 <= found < 600 else None
