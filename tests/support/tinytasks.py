"""Tasks for tests: those in grid/tasks, the harness's on local data, and one of one's own."""

import json
from pathlib import Path

import yaml
from support.shared import DATA, needs

SHIPPED = Path(__file__).parents[2] / "grid" / "tasks"
needs_data = needs(DATA / "piqa")


def own_task(folder, rows=6, **fields):
    """A YAML of one's own beside its data: {question, answer} a row."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps({"question": f"{split} {i} + 1?", "answer": str(i + 1)}) for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    config = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
        "training_split": "train",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **fields,
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump({n: v for n, v in config.items() if v is not None}))
    return str(folder / "sums.yaml")
