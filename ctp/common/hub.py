"""The Hugging Face hub: which commit a name stands for, and a commit's files on this machine.

`commit` and `check_access` are for planning, `fetch` and `fetch_model` for workers: one process of a node downloads,
the others wait and read its files without the network. Every failure is one sentence.
"""

import errno
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctp.common.files import cache_dir, write_json

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = ("*.json", "*.model", "*.txt", "*.jinja")  # configurations and tokenizers, and the index of shards
SAFETENSORS = ("model.safetensors", "model-*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin")
SECONDS = 10.0  # to wait for an answer while planning
SILENCE = 300.0  # seconds without asking again after the hub could not be reached
_silent_until = 0.0


class Unreachable(ValueError):
    """The hub does not answer, and this machine's cache does not have what was requested."""


def commit(name: str, revision: str = "", what: str = "model", instead: str = "a folder") -> str:
    """The commit that `revision` (or main) points to, from the hub or, without a network, from its local cache.

    what: "model", "adapter" or "data set", for errors; instead: what would do without a network. A commit is returned
    as it is. Raises ValueError, in one sentence, where there is none; Unreachable where nobody can tell.
    """
    global _silent_until
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        _check_reachable()
        info = HfApi().dataset_info if what == "data set" else HfApi().model_info
        return str(info(name, revision=revision or None, timeout=SECONDS).sha)
    except Exception as e:  # whatever the transport raises, whose library changes
        if refused := _refusal(e, name, what, revision):
            raise refused from e
        _silent_until = max(_silent_until, time.monotonic() + SILENCE)
        if known := _cached(name, revision, what):
            return known.name
        raise Unreachable(f"{name!r} is no folder, the hub cannot be reached ({type(e).__name__}) and its cache has no "
                          f"such {what}. Without a network: {instead}") from e  # fmt: skip


def check_access(name: str, revision: str) -> None:
    """Raises ValueError, in one sentence, where this machine could not fetch the model.

    Without a request where its configuration was fetched before.
    """
    if _remembered(_memo(name, revision, CONFIG)) or _cached(name, revision, "model"):
        return
    from huggingface_hub import HfApi

    try:
        _check_reachable()
        HfApi().auth_check(name)
    except Exception as e:
        why = explain(e, name, "model", revision)
        if isinstance(why, Unreachable) or _refusal(e, name, "model", revision):
            raise why from e  # anything else is a mirror that does not know this request


def _check_reachable() -> None:
    if time.monotonic() < _silent_until:
        raise ConnectionError(f"no request for {SILENCE:.0f} seconds")


def _download(name: str, commit: str, files: Sequence[str], **how: Any) -> Path:
    """The snapshot folder with these files of a commit, those in subfolders left out: other frameworks' weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    wanted = {"allow_patterns": list(files), "ignore_patterns": ["*/*"]}
    return Path(snapshot_download(name, revision=commit or None, **wanted, **how))


def _cached(name: str, revision: str, what: str) -> Path | None:
    """The snapshot of a revision in the hub's own cache, if its configuration is there."""
    if what == "data set":
        return None  # kept by another library, which finds it by its commit
    try:
        return _download(name, revision, ["*config.json"], local_files_only=True)
    except Exception:  # it is not there, or the name is none
        return None


def fetch(name: str, commit: str, files: Sequence[str], what: str = "model") -> Path:
    """The folder with those files of a commit that match a pattern in `files`, those in subfolders left out.

    Downloaded once a node and then read without the network. Raises ValueError, in one sentence, where that fails.
    """
    memo = _memo(name, commit, files)
    if there := _remembered(memo):
        return there
    from filelock import FileLock

    memo.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(memo.with_suffix(".lock")):
        if there := _remembered(memo):
            return there  # another process of this node was first
        try:
            folder = _download(name, commit, files)
        except Exception as e:
            raise explain(e, name, what, commit) from e
        found = {f.name: f.stat().st_size for pattern in files for f in sorted(folder.glob(pattern))}
        write_json(memo, {"folder": str(folder), "files": found})
    return folder


def fetch_model(name: str, commit: str, weights: bool = True) -> tuple[Path, bool]:
    """(folder, whether its weights are safetensors) of a model; weights=False: configuration and tokenizer alone.

    A commit without safetensors gives its pytorch_model*.bin, which `torch.load` reads with weights_only: no code in
    them is run. Raises ValueError where a commit holds neither, or not all that its index names.
    """
    if not weights:
        return fetch(name, commit, CONFIG), True
    for files in (SAFETENSORS, PICKLED):
        folder = fetch(name, commit, (*CONFIG, *files))
        if any(True for pattern in files for _ in folder.glob(pattern)):
            _check_whole(folder, files[0])
            return folder, files == SAFETENSORS
    raise ValueError(f"the model {name!r} at {commit} holds neither {SAFETENSORS[0]} nor {PICKLED[0]}")


def _check_whole(folder: Path, file: str) -> None:
    index = folder / f"{file}.index.json"
    if (folder / file).is_file() or not index.is_file():
        return
    lacking = sorted({n for n in json.loads(index.read_text())["weight_map"].values() if not (folder / n).is_file()})
    if lacking:
        raise ValueError(f"{folder} lacks {lacking[0]}, which {index.name} names: remove that folder to fetch it again")


def _memo(name: str, commit: str, files: Sequence[str]) -> Path:
    """Where this node remembers what was fetched."""
    wanted = hashlib.sha256("\n".join(files).encode()).hexdigest()[:12]
    return cache_dir() / "hub" / f"{name.replace('/', '--')}-{commit}-{wanted}.json"


def _remembered(memo: Path) -> Path | None:
    """The folder that a memo names, if every file in it is as large as it was."""
    try:
        known = json.loads(memo.read_text())
        folder = Path(known["folder"])
        same = folder.is_dir() and all((folder / n).stat().st_size == size for n, size in known["files"].items())
        return folder if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def explain(error: Exception, name: str, what: str, revision: str = "") -> ValueError:
    """One sentence for what the hub's client (or `datasets`) raised; Unreachable where it is the network's fault."""
    if refused := _refusal(error, name, what, revision):
        return refused
    kind = type(error).__name__
    if _network(list(_causes(error))):
        return Unreachable(f"the hub cannot be reached ({kind}) and this machine does not have all of the {what} "
                           f"{name!r} at {revision or 'main'}; what has arrived is kept for the next try")  # fmt: skip
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return ValueError(f"the {what} {name!r} at {revision or 'main'} cannot be fetched: {kind}: {line}")


def _refusal(error: Exception, name: str, what: str, revision: str) -> ValueError | None:
    """One sentence for an error that says why it will not be better next time; None for others."""
    from huggingface_hub import constants, errors, get_token

    chain = list(_causes(error))
    kinds = {cls for e in chain for cls in type(e).__mro__}
    status, thing = _status(chain), f"the {what} {name!r}"
    page = f"{constants.ENDPOINT}/{'datasets/' if what == 'data set' else ''}{name}"
    if errors.GatedRepoError in kinds and get_token() is None:
        message = f"{thing} is gated: accept its licence on {page}, then `hf auth login` or set HF_TOKEN"
    elif errors.GatedRepoError in kinds:
        message = (f"{thing} is gated, and the account of this machine's token may not read it: accept its licence on "
                f"{page} with that account, or log in with another (`hf auth login` or HF_TOKEN)")  # fmt: skip
    elif errors.RevisionNotFoundError in kinds:
        message = f"{thing} has no revision {revision!r} on the hub"
    elif kinds & {errors.RepositoryNotFoundError, errors.HFValidationError}:
        message = (f"no {what} {name!r} on the hub, nor a folder of that name; if it is private or gated, see {page}, "
                "then `hf auth login` or set HF_TOKEN")  # fmt: skip
    elif status in (401, 403):
        message = (f"the hub refuses this machine's token for {thing} ({status}): log in anew with `hf auth login` or "
                f"correct HF_TOKEN; its page is {page}")  # fmt: skip
    elif any(getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e) for e in chain):
        message = (f"the disk is full: {thing} is fetched into {constants.HF_HOME}; free some space, or name another "
                "folder in HF_HOME")  # fmt: skip
    else:
        return None
    return ValueError(message)


def _status(chain: Sequence[Any]) -> int | None:
    """The HTTP status that the hub answered with, None where there was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((e.response.status_code for e in chain if isinstance(e, HfHubHTTPError)), None)


def _network(chain: Sequence[Any]) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if (status := _status(chain)) is not None:
        return status >= 500 or status == 429
    kinds = {cls for e in chain for cls in type(e).__mro__}
    libraries = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
    return bool(kinds & {ConnectionError, TimeoutError, LocalEntryNotFoundError}) or any(
        cls.__module__.startswith(libraries) for cls in kinds
    )


def _causes(error: BaseException | None) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
