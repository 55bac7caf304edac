"""Texts that come with Python packages, so that a study runs where nothing can be downloaded.

wikipedia: encyclopedia articles of gensim's test data. newswire: the Lee background corpus, also there.
pydoc: the language reference that `help()` shows, of the standard library.
"""

import functools
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

VERSION = 1  # of the extraction and of the split rule: raise it whenever a split's text changes

_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWSWIRE = "lee_background.cor"

# One part in so many is validation, one is test: about 15,000 tokens each.
PARTS = {"wikipedia": 10, "newswire": 4, "pydoc": 5}


def fingerprint(name: str) -> str:
    """`sha256:<hex>` over the packaged bytes of `name` and everything that turns them into documents.

    Raises ValueError when the package is not installed. Cheap: extracts nothing.
    """
    digest = hashlib.sha256(f"{name} {VERSION} {PARTS[name]}\n".encode())
    if name == "pydoc":
        digest.update(json.dumps(_topics(), sort_keys=True).encode())
    else:
        digest.update(_gensim_data(_WIKIPEDIA if name == "wikipedia" else _NEWSWIRE).read_bytes())
    if name == "wikipedia":  # gensim's markup filter shapes the text too
        digest.update(importlib.metadata.version("gensim").encode())
    return f"sha256:{digest.hexdigest()}"


def documents(name: str, split: str) -> list[str]:
    """The documents of one split (train, validation, test) of the packaged text `name`; splits share none.

    Raises ValueError when the package is not installed.
    """
    return part(_documents(name), split, PARTS[name])


def part(texts: Sequence[str], split: str, parts: int) -> list[str]:
    """Of every `parts` documents in a row the last is test, the one before it validation, the others train."""
    held_out = {parts - 2: "validation", parts - 1: "test"}
    return [text for i, text in enumerate(texts) if held_out.get(i % parts, "train") == split]


def sections(text: str, size: int = 2000) -> list[str]:
    """`text` cut at blank lines into sections of at least `size` characters; a short rest joins the last one."""
    found: list[list[str]] = [[]]
    length = 0
    for paragraph in re.split(r"\n\s*\n", text):
        if length >= size:
            found.append([])
            length = 0
        found[-1].append(paragraph)
        length += len(paragraph)
    if length < size and len(found) > 1:
        rest = found.pop()
        found[-1].extend(rest)
    return ["\n\n".join(paragraphs) for paragraphs in found if any(p.strip() for p in paragraphs)]


@functools.cache
def _documents(name: str) -> tuple[str, ...]:
    read: dict[str, Callable[[], Iterator[str]]] = {"wikipedia": _wikipedia, "newswire": _newswire, "pydoc": _pydoc}
    return tuple(read[name]())


def _gensim_data(name: str) -> Path:
    found = importlib.util.find_spec("gensim")  # found, not imported: planning stays light
    if found is None or found.origin is None:
        raise ValueError("this packaged text is part of gensim: pip install gensim")
    path = Path(found.origin).parent / "test" / "test_data" / name
    if not path.is_file():
        raise ValueError(f"this gensim comes without its test data: {path} is missing")
    return path


def _newswire() -> Iterator[str]:
    """Reports, without those that repeat two sentences of an earlier one: the wire sends updates."""
    seen: set[str] = set()
    for line in _gensim_data(_NEWSWIRE).read_text(encoding="utf-8").split("\n"):
        sentences = {s for s in re.split(r"(?<=[.!?])\s+", line.strip()) if len(s) > 60}
        if line.strip() and len(sentences & seen) < 2:
            yield line.strip()
        seen |= sentences


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python comes without pydoc_data, the text of help()") from error
    return dict(topics)


def _pydoc() -> Iterator[str]:
    """Sections of the topics. Topics overlap: a paragraph counts once, in the longest topic, so that splits do not."""
    seen: set[str] = set()
    for _, text in sorted(_topics().items(), key=lambda item: (-len(item[1]), item[0])):
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())  # the same paragraph may be indented differently
            if words not in seen:
                fresh.append(paragraph.rstrip())
                seen.add(words)
        if sum(map(len, fresh)) >= 500:  # less is a title and left-overs
            yield from sections("\n\n".join(fresh).strip("\n"))


_BACK_MATTER = re.compile(
    r"see also|notes?|footnotes?|references|sources|citations|bibliography|further reading|external links|works cited"
    r"|gallery|discography|filmography|publications|.*\b(references|bibliography|sources|reading|links)\b.*",
    re.IGNORECASE,
)
_HEADING = re.compile(r"\s*(={2,6})\s*(.*?)\s*\1\s*$")
_FILE = re.compile(r"\[\[\s*(?:File|Image)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", re.IGNORECASE)
_LOST = "\ue000"  # stands where a formula was: a paragraph with a hole in it is left out
_FORMULA = re.compile(
    r"<(math|chem|score|hiero)\b[^>]*>.*?</\1>|\{\{\s*(?:math|mvar|chem2?|val|frac|sfrac|su[bp]|SimpleNuclide2?|e|sqrt"
    r"|nuclide|physics particle|angbr|IPA|IPAlink|keypress|unicode|bartable|inflation|nihongo)\s*(?:\|[^{}]*)?\}\}",
    re.IGNORECASE | re.DOTALL,
)
# Templates that are part of the sentence, with what of them is read aloud.
_INLINE = [
    (re.compile(r"\{\{\s*(?:convert|cvt)\s*\|\s*([^|{}]+)\|\s*([^|{}]+)[^{}]*\}\}", re.IGNORECASE), r"\1 \2"),
    (re.compile(r"\{\{\s*lang\s*\|[^|{}]*\|([^|{}]*)[^{}]*\}\}", re.IGNORECASE), r"\1"),
    (re.compile(r"\{\{\s*transl\s*\|(?:[^|{}]*\|)*([^|{}]*)\}\}", re.IGNORECASE), r"\1"),
    (re.compile(r"\{\{\s*(?:nowrap|small|smaller|vanchor|as of)\s*\|([^|{}]*)[^{}]*\}\}", re.IGNORECASE), r"\1"),
    (re.compile(r"\{\{\s*'s\s*\}\}"), "'s"),
    (re.compile(r"\{\{\s*(?:nbsp|spaces?)\s*\}\}", re.IGNORECASE), " "),
    (re.compile(r"\{\{\s*(?:spaced )?[nm]dash\s*\}\}", re.IGNORECASE), " – "),
]
# After the markup is gone: quotes of bold and italics, what empty templates leave behind, spaces.
_TIDY = [
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"[\u00a0\u2009\u200a\u202f\t ]+"), " "),
    (re.compile(r"\(\s*(?:or|from|also|,|;|:|\.|/|\s)*\s*\)"), ""),
    (re.compile(r"\(\s*(?:[,;:]\s*)+"), "("),
    (re.compile(r"(?:\s*[,;:])+\s*\)"), ")"),
    (re.compile(r"([,;:])(?:\s*[,;:])+"), r"\1"),
    (re.compile(r"\s+([,.;:!?)])"), r"\1"),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r" {2,}"), " "),
]


def _wikipedia() -> Iterator[str]:
    """Articles as plain paragraphs. gensim's filter leaves captions, table cells, list items and back matter."""
    import bz2

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(_gensim_data(_WIKIPEDIA), "rb") as dump:
        for title, raw, _ in extract_pages(dump, filter_namespaces=("0",)):
            if re.match(r"\s*#redirect", raw, re.IGNORECASE) or "disambig" in f"{title} {raw[-500:]}".lower():
                continue
            text = "\n\n".join(_paragraphs(filter_wiki(_readable(raw))))
            if len(text) >= 1000:
                yield text


def _readable(raw: str) -> str:
    """Wiki markup in which the templates that carry words are words, and formulas are marked as lost."""
    text = _FILE.sub("", html.unescape(html.unescape(raw)))
    text = _FORMULA.sub(_LOST, text)
    for pattern, words in _INLINE:
        text = pattern.sub(words, text)
    return text


def _paragraphs(filtered: str) -> Iterator[str]:
    """The lines that are prose: whole sentences of the article's body."""
    hidden = 0  # level of the back matter heading that we are under, 0 for none
    for line in filtered.split("\n"):
        if heading := _HEADING.match(line):
            level = len(heading[1])
            if not hidden or level <= hidden:
                hidden = level if _BACK_MATTER.fullmatch(heading[2]) else 0
            continue
        for pattern, tidy in _TIDY:
            line = pattern.sub(tidy, line)
        line = line.strip()
        if not hidden and _is_prose(line):
            yield line


def _is_prose(line: str) -> bool:
    starts = re.match(r"[\w\"'“‘(]", line) and not line[0].islower()
    if len(line) < 80 or not starts or not re.search(r"[.!?][\"'”’)]*$", line):
        return False
    if re.search(rf"[{_LOST}|{{}}\[\]<>=]|https?:|\b(px|thumb|colspan|rowspan|style)\b", line):
        return False
    return re.search(r"\b[a-z]+ [a-z]+ [a-z]+\b", line) is not None  # some running words, not names or numbers alone
