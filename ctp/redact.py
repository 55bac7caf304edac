"""Secrets, taken out of what is printed, logged or kept: tokens, passwords and keys, wherever a message has them."""

import os
import re

HIDDEN = "***"
_NAME = (
    r"(?:token|secret|password|passwd|passphrase|credentials?|api_?key|access_?key(?:_id)?|secret_?key|private_?key)"
)
_VARIABLE = re.compile(rf"(?:^|_){_NAME}(?:$|_)", re.IGNORECASE)
# user:password@ of a URL, fields of its query, name = value, --name value, tokens of known form.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s'\"@]*(?:@[^/\s'\"@]*)*@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(r"([?&;][\w-]*(?:token|secret|passw|key|sig|credential|auth)[\w-]*=)[^&\s'\"]+", re.IGNORECASE),
     rf"\1{HIDDEN}"),
    (re.compile(rf"(?<![a-z])((?:[\w.-]*[_.-])?{_NAME}['\"]?\s*[=:]\s*['\"]?)[^\s'\",&}}\]]{{4,}}", re.IGNORECASE),
     rf"\1{HIDDEN}"),
    (re.compile(rf"(--(?:[\w-]*-)?{_NAME.replace('_', '[_-]')}[ =]['\"]?)[^\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(Bearer|Basic) [\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"\b(?:hf_\w{8,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
                r"|xox[abp]-[\w-]{10,}|glpat-[\w-]{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"), HIDDEN),
)  # fmt: skip


def scrub(text: str) -> str:
    """The text without what looks like a secret, and without the values of environment variables named like one.

    URLs lose `user:password@` and query fields such as `token=`; `password=…` and `--token …` lose what follows.
    """
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text


def _secrets() -> list[str]:
    """Values of this process's environment that nobody else is to read; the longest first."""
    found = {v.strip() for n, v in os.environ.items() if _VARIABLE.search(n)}
    return sorted((v for v in found if len(v) >= 6 and not v.startswith(("/", "~", "."))), key=len, reverse=True)
