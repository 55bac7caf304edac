"""Secrets, taken out of what is printed, logged or kept: tokens, passwords and keys, wherever a message has them."""

import os
import re

HIDDEN = "***"
_NAME = (
    r"(?:token|secret|password|passwd|passphrase|credentials?|api_?key|access_?key(?:_id)?|secret_?key|private_?key)"
)
_VARIABLE = re.compile(rf"(?:^|_){_NAME}(?:$|_)", re.IGNORECASE)
LONGEST = 2**19  # characters of a text that are looked at: of a longer one both ends
# What is hidden as it stands: user:password@ of a URL, tokens of known form. Every rule here and below takes time in
# proportion to the text, whatever it holds: no scan begins inside what an earlier one has passed.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"://[^/\s'\"]*@"), f"://{HIDDEN}@"),
    (re.compile(r"\b(Bearer|Basic) [\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(?:hf_\w{8,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
                r"|xox[abp]-[\w-]{10,}|glpat-[\w-]{16,}|eyJ[\w-]{10,}(?:\.[\w-]+)*)"), HIDDEN),
)  # fmt: skip
# What is hidden behind a name: fields of a URL's query, name = value, --name value. Each is what comes before the
# value, with the name as its group; what the name must be; and the value.
_NAMED: tuple[tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]], ...] = (
    (re.compile(r"[?&;]([\w-]*)="), re.compile("token|secret|passw|key|sig|credential|auth", re.IGNORECASE),
     re.compile(r"[^&\s'\"]+")),
    (re.compile(rf"(?<![a-z])({_NAME})['\"]?\s*[=:]\s*['\"]?", re.IGNORECASE), re.compile(""),
     re.compile(r"[^\s'\",&}\]]{4,}")),
    (re.compile(r"(?<![\w-])([\w-]+)[ =]['\"]?"),
     re.compile(rf"^(?=[\w-]*--)[\w-]*-{_NAME.replace('_', '[_-]')}$", re.IGNORECASE), re.compile(r"[^\s'\"]+")),
)  # fmt: skip


def scrub(text: str) -> str:
    """The text without what looks like a secret, and without the values of environment variables named like one.

    URLs lose `user:password@` and query fields such as `token=`; `password=…` and `--token …` lose what follows. Of a
    text of more than LONGEST characters the middle goes too.
    """
    if len(text) > LONGEST:
        return _both_ends(text)
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    for rule in _NAMED:
        text = _without(text, *rule)
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text


def _both_ends(text: str) -> str:
    """Both ends of a long text. The last of what is scrubbed goes: the cut may have gone through a secret there."""
    half, room = LONGEST // 4, LONGEST // 8
    left = f" … ({len(text) - 2 * half:,} characters left out) … "
    return scrub(text[: half + room])[:-room] + left + scrub(text[-half - room :])[room:]


def _without(text: str, before: re.Pattern[str], name: re.Pattern[str], value: re.Pattern[str]) -> str:
    """The text with every value hidden that stands behind such a name."""
    parts, end = [], 0
    for found in before.finditer(text):
        if found.start() >= end and name.search(found[1]) and (hidden := value.match(text, found.end())):
            parts += [text[end : found.end()], HIDDEN]
            end = hidden.end()
    return "".join([*parts, text[end:]])


def _secrets() -> list[str]:
    """Values of this process's environment that nobody else is to read; the longest first."""
    found = {v.strip() for n, v in os.environ.items() if _VARIABLE.search(n)}
    return sorted((v for v in found if len(v) >= 6 and not v.startswith(("/", "~", "."))), key=len, reverse=True)
