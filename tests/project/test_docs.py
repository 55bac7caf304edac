"""What README and docs show is what happens: their blocks run, their commands parse, their links lead somewhere."""

import itertools
import re
import shlex
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.adapters import save_lora
from support.gridruns import without_ray
from support.pages import Block, Reader, blocks
from support.tiny import tiny_llama, tiny_opt
from support.tinygrid import VOCAB, byte_tokenizer, grid, model_folder, write_grid
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import ctp
from ctp import cli
from ctp.cells import Compression, Measure, Recovery
from ctp.data.packaged import documents
from ctp.models import sources
from ctp.models.load import load_model
from ctp.planning import graph, gridfile, plan, plugins
from ctp.planning.pins import Pins
from ctp.prompts.files import load_prompt, save_prompt

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "grid" / "tasks" / "README.md"]


@pytest.fixture
def page(tmp_path, monkeypatch, new_database):
    """A folder to run a page in: no Ray, methods of its own forgotten afterwards, MLflow's address too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    new_database(tmp_path / "results")
    without_ray(monkeypatch)
    for family in (Compression, Measure, Recovery):
        monkeypatch.setattr(family, "registry", dict(family.registry))
    monkeypatch.setattr(plugins, "_sources", {})
    before = mlflow.get_tracking_uri()
    yield tmp_path
    mlflow.set_tracking_uri(before)


def demo(folder, failing=False):
    """A finished grid `demo` in the working directory, as `ctp grid demo.yaml` leaves it."""
    model = model_folder(folder / "tiny")
    content = grid(model, define={"llama-7b": str(model), "c4": {"dataset": "pydoc"}})
    content["recovery"] |= {"k": [2, 4], "steps": 2, "validate_every": 1}
    if failing:  # one prompt asks for more text than there is
        wrong = content["recovery"] | {"k": 3, "text": content["recovery"]["text"] | {"count": 10**6}}
        content["recovery"] = [content["recovery"], wrong]
    write_grid(folder / "demo.yaml", content)
    assert cli.main(["grid", "demo.yaml"]) == (1 if failing else 0)


def test_the_mlflow_page(page):
    demo(page, failing=True)
    mlflow.set_tracking_uri("sqlite:///results/mlflow.db")
    reader = Reader()
    assert sum(reader.read(b) for b in blocks(ROOT / "docs" / "mlflow.md")) >= 15
    n = reader.names
    assert n["matrix"].shape == (3, 3)  # none, k = 2, k = 4
    assert set(n["won"].index) == {"dense", "gptq-3bit", "sparsegpt-50-4bit"}
    assert list(n["failed"]["params.k"]) == ["3"]
    assert "1000000" in n["failed"]["tags.ctp.error"].iloc[0]
    assert len(n["best"]) == 3
    assert len(n["written"]) == 3 + 3 + 9  # compressed; learned, the failed one too; measured
    assert len(n["learned"]) == 2
    last = n["last"]
    assert tuple(last[f"metrics.grid/{n}"] for n in ("cells", "done", "failed")) == (18, 14, 1)
    attached = {f.path for f in n["client"].list_artifacts(last.run_id)}
    assert attached == {"grid.yaml", "manifests.json", "report.html", "figures"}
    assert set(n["figures"]) >= {"figures/figure2.png", "figures/figure2.pdf"}
    assert set(n["manifests"]) == set(n["cells"]["tags.ctp.key"])
    assert n["page"] == Path("results/report_demo.html").read_text(encoding="utf-8")


def read_page(name, **how):
    reader = Reader(**how)
    assert sum(reader.read(b) for b in blocks(ROOT / "docs" / name)) >= 2
    return reader


def own_model(folder):
    """What several pages call "my-model" and "my-text.txt"."""
    model_folder(folder / "my-model", hidden=64, context=160)
    (folder / "my-text.txt").write_text("\n\n".join(documents("pydoc", "train")[:60]))


def test_the_tutorial(page):
    reader = read_page("tutorial.md")
    assert reader.names["model"].config.hidden_size == 64


def test_the_page_on_ones_own(page):
    read_page("extend.md")


def test_the_page_on_production(page):
    own_model(page)
    reader = read_page("production.md")
    assert (reader.names["with_prompt"] != reader.names["without"]).any()
    embeds = reader.names["prompt_embeds"]
    check_embeds(embeds, tiny_llama(vocab=VOCAB), page / "one")
    check_embeds(embeds, tiny_opt(vocab=VOCAB, embed=16), page / "several", max_shard_size="20KB")
    for kind in (Gemma2, Gemma3Text):
        check_embeds(embeds, gemma(*kind), page / kind[0].__name__, max_shard_size="20KB")


GEMMA = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
Gemma2, Gemma3Text = (Gemma2Config, Gemma2ForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM)


def gemma(config, kind):
    torch.manual_seed(0)
    return kind(config(**GEMMA)).eval()


def check_embeds(prompt_embeds, model, folder, **options):
    """The page's embeddings are what the model reads behind the prompt: the same logits."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() == bool(options)
    width = model.get_input_embeddings().embedding_dim
    save_prompt(folder / "prompt", torch.randn(3, width, generator=torch.Generator().manual_seed(1)), "m")
    embeds = prompt_embeds(folder, folder / "prompt", "The capital")
    if model.config.model_type == "gemma2":  # as vLLM does
        embeds = embeds * width**0.5
    ids = byte_tokenizer()("The capital", return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(inputs_embeds=embeds[None]).logits[0, 3:]
        handle = ctp.attach_prompt(model, load_prompt(folder / "prompt"))
        assert torch.allclose(found, model(ids).logits[0], atol=1e-5, rtol=1e-5)  # fp32, rows multiplied and divided
        handle.remove()


def test_the_page_on_one_table(page):
    read_page("one-table.md")


# ------------------------------------------------------------------ README


def section(heading: str) -> list[Block]:
    """The blocks under a heading of the README."""
    text = (ROOT / "README.md").read_text()
    start = text.index(f"\n## {heading}\n")
    end = text.find("\n## ", start + 1)
    lines = range(text[:start].count("\n"), text[: end if end > 0 else len(text)].count("\n") + 1)
    return [b for b in blocks(ROOT / "README.md") if b.line in lines]


def test_every_python_block_of_the_readme_is_run():
    """Here, in test_api.py (In Python) or in test_plugins.py (the file that it shows)."""
    run = [b for h in ("The transfer matrix", "Prompts are PEFT adapters", "In Python") for b in section(h)]
    for block in blocks(ROOT / "README.md"):
        if block.language == "python" and "class MeanPrompt" not in block.text:
            assert block in run


def test_the_readmes_matrix_and_adapter(page):
    demo(page)
    learned = next(page.glob("results/store/learn/*k4*"))
    reader = Reader({"mlflow": mlflow}, {"learn/DIR": f"learn/{learned.name}"})
    matrix, adapters = section("The transfer matrix"), section("Prompts are PEFT adapters")
    assert [reader.read(b) for b in matrix if b.language == "python"] == [True]
    assert "gptq-3bit" in reader.printed
    reader.names["model"] = ctp.load(page / "tiny")[0]
    assert [reader.read(b) for b in adapters if b.language == "python"] == [True]
    assert reader.names["model"].peft_config["default"].num_virtual_tokens == 4


def planned(content: dict) -> graph.Plan:
    pins = Pins(provisional=True)
    return plan.make(gridfile.load(str(write_grid(Path("shown.yaml"), content)), [], pins), pins)


def test_the_readmes_grid_has_the_cells_that_it_says(page):
    """On two tiny models; c4, wikitext2 and ptb as folders of --data would be."""
    shown = next(b.text for b in section("The grid file") if b.language == "yaml")
    for name in ("my-llama", "other"):
        model_folder(page / name, hidden=64, context=4096)
    found = planned(yaml.safe_load(shown.replace("smollm2-135m", "./other")))
    kinds = [n.cell.kind for n in found.nodes.values()]
    assert {k: kinds.count(k) for k in set(kinds)} == {"compress": 2 * 4, "learn": 8, "evaluate": 2 * 40}


@pytest.mark.parametrize("heading", ["Smaller on disk, and open elsewhere", "Recovery, measures, and your own",
                                     "Prompts are PEFT adapters"])  # fmt: skip
def test_the_readmes_other_grid_lines_are_valid(page, heading):
    own_model(page)
    model, tokenizer = load_model(sources.locate("./my-model")[2], "")
    gptq = ctp.compress(model, tokenizer, {"method": "gptq", "bits": 4, "group_size": 16}, documents("pydoc", "train"),
                        count=2, seq_len=24)  # fmt: skip
    ctp.export(gptq, "llama-7b-gptq-4bit", "gptq")
    save_lora(model, page / "my-lora", target_modules=["q_proj"])
    (page / "mean_prompt.py").write_text((ROOT / "tests" / "plugins" / "mean_prompt.py").read_text())
    shown = [b.text for b in section(heading) if b.language == "yaml"]
    assert shown
    for text in shown:
        lines = [x for x in text.splitlines() if "someone/" not in x]  # a hub id of nobody
        own = yaml.safe_load("\n".join(lines))
        for recovery in own.get("recovery", []):
            if recovery["method"] == "mean_prompt":
                recovery["text"] = {"dataset": "pydoc", "split": "train", "seq_len": 24, "count": 8}
        assert planned(grid("./my-model") | {"sources": ["dense"]} | own).nodes


# ------------------------------------------------------------------ commands and links


def commands(page: Path) -> list[str]:
    """Every command line of ctp that a page shows in a block."""
    shown = [b.text.replace("\\\n", " ") for b in blocks(page) if b.language in ("sh", "", "console")]
    lines = [line.strip().removeprefix("$ ") for text in shown for line in text.splitlines()]
    return [x for x in lines if re.match(r"(python -m (ctp|analysis)\.|ctp )", x)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_there_with_these_options(page):
    modules = {c.called: c for c in cli.ALL.values()} | {c.module: c for c in cli.ALL.values()}
    for line in commands(page):
        words = shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True)
        if words[-1] == "--help":
            continue
        at = 1 if words[0] == "ctp" else 3
        command = cli.ALL[words[1]] if at == 1 else modules[words[2]]
        name = next(n for n, c in cli.ALL.items() if c is command)
        with cli.named(name, []):
            parser = cli.load(command).parser()
        assert parser.parse_args(words[at + (at == 1) :]), line


MARKDOWN = MarkdownIt("commonmark").enable("table")


def parsed(page: Path) -> list[Token]:
    """A page's tokens, those inside paragraphs, cells and headings too."""
    tokens = MARKDOWN.parse(page.read_text())
    return [t for block in tokens for t in (block, *(block.children or ()))]


def headings(page: Path) -> list[tuple[int, str]]:
    """(level, words) of a page's headings."""
    tokens = MARKDOWN.parse(page.read_text())
    return [
        (int(t.tag[1]), "".join(c.content for c in inline.children))
        for t, inline in itertools.pairwise(tokens)
        if t.type == "heading_open"
    ]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page; one that comes again is numbered."""
    found: dict[str, int] = {}
    for _, words in headings(page):
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {n if i == 0 else f"{n}-{i}" for n, last in found.items() for i in range(last + 1)}


def problems(page: Path) -> list[str]:
    """What a reader of the rendered page would stumble over."""
    out, lines = [], page.read_text().splitlines()
    for token in parsed(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if target and not target.startswith(("http://", "https://", "mailto:")):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.exists() or not there.is_relative_to(ROOT.resolve()):
                out.append(f"{target} leads nowhere")
            elif anchor and anchor not in anchors(there):
                out.append(f"{target}: it has {sorted(anchors(there))}")
        if token.type == "image" and not token.content.strip():
            out.append(f"{target}: no words for those who do not see it")
        if token.type in ("html_block", "html_inline"):
            out.append(f"HTML: {token.content}")
        if token.type == "text" and re.search(r"\]\(|\]\[", token.content):
            out.append(f"a link that is none: {token.content}")
        if token.type == "table_open" and len({len(re.findall(r"(?<!\\)\|", x)) for x in lines[slice(*token.map)]}) > 1:
            out.append(f"a table whose rows have different numbers of cells, line {token.map[0] + 1}")
        if token.type == "fence" and not re.fullmatch(r"\s*```", lines[token.map[1] - 1]):
            out.append(f"a block without an end, line {token.map[0] + 1}")
    levels = [level for level, _ in headings(page)]
    if levels[:1] != [1] or levels.count(1) > 1 or any(b > a + 1 for a, b in itertools.pairwise(levels)):
        out.append(f"headings of levels {levels}")
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_reads_well_and_its_links_lead_somewhere(page):
    assert problems(page) == []


@pytest.mark.parametrize(("text", "told"), [
    ("# A\n\n[x](none.md)", "none.md leads nowhere"), ("# A\n\n[x](#b)", r"#b: it has \['a'\]"),
    ("# A\n\n[x][y]", "a link that is none"), ("# A\n\n![](p.md)", "no words"), ("# A\n\n<b>x</b>", "HTML: <b>"),
    ("# A\n\n|a|b|\n|---|---|\n|1|`x|y`|\n", "different numbers of cells, line 3"),
    ("# A\n\n```\nx\n", "without an end"),
    ("# A\n\n### B\n", r"headings of levels \[1, 3\]"), ("# A\n\n[x](../../etc)", "leads nowhere"),
])  # fmt: skip
def test_what_is_wrong_with_a_page_is_found(text, told, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "p.md").write_text(text)
    assert any(re.search(told, said) for said in problems(tmp_path / "p.md"))
    (tmp_path / "p.md").write_text("# A\n\n## A `b`\n\n## A b\n\n[x](p.md#a-b-1) ![words](p.md#a)\n")
    assert problems(tmp_path / "p.md") == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
