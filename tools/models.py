"""Writes docs/models.md: what works on which model type, from the table of tiny models and what ctp refuses.

python -m tools.models
"""

from pathlib import Path

from ctp.formats import FORMATS
from ctp.formats.loaders import refusals
from ctp.models.config import config_facts
from tools.zoo import MODELS, config

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
USES = ("compress", "prompt", "lora", "generate")
HEAD = """# Model types

What works on which architecture, for transformers' model types. "yes" is tested on a tiny random model of the type
(`tests/zoo`): the calibration inputs of every block are the model's own, and the stored model reloads to the same
logits; a hard prompt gives what its text in front of the input gives, in perplexity, tasks and generation, with and
without a cache and with left padding; gradients of prompts and LoRA are those of the model's own forward pass. "no" is
refused while planning, with the reason in the last column. Exports are opened by transformers; those to `gptq` by
ctp's reader, and for the models of `make test-all` by GPTQModel.

Other model types follow the same rules, which look at the configuration and the modules, not at the name: try
`python -m ctp.grid NAME --plan`.

`make models` writes this page from `tools/zoo.py`, where a new architecture is one more line.

| model | compress | prompt | LoRA | generate | exports | why not |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The text of the page."""
    return HEAD + "".join(map(_row, MODELS))


def _row(name: str) -> str:
    settings, type = config(name), MODELS[name].type
    refused = config_facts(settings).refused
    formats = {} if "compress" in refused else refusals(settings)
    opened = [] if "compress" in refused else [f"`{format}`" for format in FORMATS if format not in formats]
    label = f"`{type}`" if name == type else f"`{type}` ({name.replace('_', ' ')})"
    why = "; ".join(f"{', '.join(what)}: {reason}" for reason, what in _reasons({**refused, **formats}).items())
    cells = [label, *("no" if use in refused else "yes" for use in USES), ", ".join(opened), why]
    return f"| {' | '.join(cells)} |\n"


def _reasons(refused: dict[str, str]) -> dict[str, list[str]]:
    """reason -> uses and formats that it stands against, without what the row says already."""
    found: dict[str, list[str]] = {}
    for what, sentence in refused.items():
        reason = sentence.split("model type ")[-1].partition(": ")[2].removesuffix(": export hf")
        found.setdefault(reason, []).append(what)
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
