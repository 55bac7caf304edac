"""Special tokens: which ones a tokenizer has, and which it puts around a text.

Windows begin with BOS as `Windows.bos` says, requests of tasks and questions as the tokenizer puts it. Behind a hard
prompt it stands once, at the very front: [BOS] + prompt + text. EOS never stands between prompt and text.
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ctp.common.files import cache_dir, write_json
from ctp.models import sources
from ctp.models.load import load_tokenizer

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"


@dataclass(frozen=True)
class Specials:
    """bos, eos: ids, None where the tokenizer has none. before, after: the ids that it puts around a text."""

    bos: int | None
    eos: int | None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Specials":
        whole, text = list(tokenizer(_PROBE)["input_ids"]), plain_ids(tokenizer, _PROBE)
        starts = [i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text]
        start = starts[0] if starts else 0
        bos, eos = (getattr(tokenizer, n, None) for n in ("bos_token_id", "eos_token_id"))
        return cls(bos, eos, tuple(whole[:start]), tuple(whole[start + len(text) :]) if starts else ())


def plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text alone."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def opening_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text that goes on: with what the tokenizer puts before it, not behind it."""
    return [*Specials.of(tokenizer).before, *plain_ids(tokenizer, text)]


def of_model(location: str, revision: str) -> Specials | None:
    """Of a located model's tokenizer, remembered on this machine; None if it is not pinned yet.

    Raises ValueError if the tokenizer cannot be loaded.
    """
    if revision == sources.UNPINNED:
        return None
    memo = cache_dir() / "specials" / f"{revision.replace(':', '-')}.json"
    if memo.exists():
        known = json.loads(memo.read_text())
        return Specials(known["bos"], known["eos"], tuple(known["before"]), tuple(known["after"]))
    found = Specials.of(load_tokenizer(location, revision))
    write_json(memo, asdict(found))
    return found
