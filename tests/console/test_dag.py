"""The graph in Mermaid: every line is one that its grammar has, every cell is drawn, few enough boxes."""

import re

import pytest
from support.plans import make
from support.tinygrid import grid

from ctp import grid as command
from ctp.console import dag

TEXT = r"(?:[\w \-.,/%+=()]|#\d+;|: )+"
LINES = re.compile("|".join((
    rf"%% {TEXT}", "flowchart LR", rf'  subgraph m\d+\["{TEXT}"\]', "  end", rf'    n\d+\["{TEXT}<br/>[\w ,]+"\]',
    r"  n\d+ -->(?:\|\d+\|)? n\d+", r"  classDef \w+ [\w:#,]+", r"  class n\d+ (?:done|some|failed|missing)",
)))  # fmt: skip


def drawn(graph, state=None):
    text = dag.mermaid(graph, state or dict.fromkeys(graph.nodes, "missing"))
    for line in text.splitlines():
        assert LINES.fullmatch(line), line
    assert text.count("  subgraph ") == text.count("\n  end")
    boxes = re.findall(r'^    (n\d+)\["(.*)<br/>(.*)"\]$', text, re.MULTILINE)
    arrows = re.findall(r"^  (n\d+) -->(?:\|(\d+)\|)? (n\d+)$", text, re.MULTILINE)
    assert {n for a, _, b in arrows for n in (a, b)} <= {n for n, _, _ in boxes}
    assert sum(int(n or 1) for _, n, _ in arrows) == sum(len(n.inputs) for n in graph.nodes.values())
    return boxes, arrows, text


def test_a_small_grid_is_drawn_cell_by_cell(tmp_path, llama_folder):
    graph = make(tmp_path / "g.yaml", **grid(llama_folder))
    first = next(iter(graph.nodes))
    state = {
        k: "done" if k == first else "failed" if n.cell.kind == "learn" else "stale" for k, n in graph.nodes.items()
    }
    boxes, _, text = drawn(graph, state)
    assert len(boxes) == 10
    assert boxes[0][1:] == ("compress: dense", "1 cell, done")
    assert "class n0 done" in text
    assert text.count(" failed\n") == 1


def test_a_large_grid_is_grouped_until_it_can_be_read(tmp_path, llama_folder):
    content = grid(llama_folder)
    content["recovery"] = [{**content["recovery"], "k": k} for k in range(1, 13)]
    boxes, _, _ = drawn(make(tmp_path / "a.yaml", **content))
    assert len(boxes) == 3 + 1 + 3  # compressions, what is learned through the one source, targets
    content["compression"] = ["dense", *({"method": "sparsegpt", "sparsity": n / 100} for n in range(10, 50))]
    content["sources"] = ["sparsegpt-10"]
    boxes, _, _ = drawn(make(tmp_path / "b.yaml", **content))
    assert [b[1:] for b in boxes] == [
        ("compress: dense", "1 cell, missing"), ("compress: sparsegpt", "40 cells, missing"),
        ("learn: soft_prompt", "12 cells, missing"), ("evaluate: perplexity", "533 cells, missing"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ['a "b"', "end", "[x]", "a|b", "a;b", "%%", "<br>", "ä#1"])
def test_no_name_leaves_its_quotes(text):
    assert re.fullmatch(r"(?:[\w \-.,/%+=()]|#\d+;)*", dag._text(text))
    back = re.sub(r"#(\d+);", lambda m: chr(int(m[1])), dag._text(text))
    assert back == text


def test_the_command_prints_the_graph_alone(capsys, tmp_path):
    assert command.main(["demo", "--plan", "--dag", "--store", str(tmp_path / "s")]) == 0
    assert all(LINES.fullmatch(line) for line in capsys.readouterr().out.splitlines())
