"""What tests share: see the names."""

import json

import pytest
from support.bench import Bench
from support.tinygrid import grid, model_folder

from ctp.common.files import Changed
from ctp.execution import loading
from ctp.storage.ref import ref


def write_text(folder, word="apples", n=60):
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = (json.dumps({"text": f"Order {i}: {i % 7} crates of {word} go to harbour {i % 13}. "}) for i in range(n))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "orders")


@pytest.fixture
def bench(tmp_path, text):
    """A model and a text of one's own, planned."""
    model = model_folder(tmp_path / "mine")
    own = {"dataset": "orders", "split": "train", "seq_len": 24}
    recovery = grid(model)["recovery"] | {"text": {**own, "count": 32}, "validation": {"count": 4}}
    bench = Bench(tmp_path, model, datasets={"orders": {"path": str(text)}}, recovery=recovery,
                  calibration={**own, "count": 8, "sampling": "crops"},
                  compression=["dense", {"method": "gptq", "bits": 3}],
                  sources=["gptq-3bit"],
                  measures={"method": "perplexity", "text": {**own, "split": "test", "count": 4}})  # fmt: skip
    bench.runtime = bench.runtime.model_copy(update={"datasets": {"orders": {"path": str(text)}}})
    loading.forget(texts=True)
    yield bench
    loading.forget(texts=True)


def fails(bench, cell, what):
    with pytest.raises(Changed, match=rf"{what}.* has changed since it was pinned .*: run again"):
        bench.execute(cell)
    assert not bench.store.has(ref(cell))
