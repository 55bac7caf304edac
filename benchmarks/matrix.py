"""The transfer matrix that `benchmarks.transfer` times: its grid, a store with targets and prompts, cells in turn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from ctp.cells import Compression, Dense, Perplexity
from ctp.cells.cell import Compress, Evaluate
from ctp.cells.events import Done
from ctp.cells.inputs import Windows
from ctp.cells.runtime import Runtime, location
from ctp.compression.quantize import fit
from ctp.data.documents import read_documents
from ctp.data.texts import find
from ctp.execution import loading
from ctp.execution.execute import execute
from ctp.execution.jobs import CompressJob
from ctp.formats.artifact import Compressed
from ctp.formats.layer import Layer
from ctp.planning import gridfile, plan
from ctp.planning.pins import Pins
from ctp.scheduling.tune import GraphSearch
from ctp.scheduling.walk import Settings
from ctp.storage.ref import ref
from ctp.storage.store import Store

MODEL, K, GROUP, BATCH = "smollm2-135m", 100, 64, 4
TARGETS: list[Any] = ["dense", *({"method": "rounded", "bits": b} for b in (4, 3, 2))]
TARGETS += [{"method": "rounded", "sparsity": s} for s in (0.5, 0.75)]
TEXTS: dict[str, dict[str, Any]] = {
    "newswire": {"split": "test"},
    "pydoc": {"split": "test"},
    "wikipedia": {"split": "train", "documents": 40},  # 1 MB, for a test set's length
}


class Rounded(Compression):
    """Linears rounded to the nearest of `bits` in groups of 64, or the smallest weights, `sparsity` of all, zeroed."""

    method: Literal["rounded"] = "rounded"
    bits: int | None = None
    sparsity: float | None = None

    def compress(self, job: CompressJob) -> dict[str, float]:
        model, tokenizer = job.load_base()
        linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
        layers = {}
        for name in linears:
            weight = model.get_parameter(f"{name}.weight").data
            layers[name] = self.layer(weight)
            weight.copy_(layers[name].dense(weight.dtype))
        small = Compressed.of(model, layers, tokenizer)
        small.save(job.folder)
        return small.stats()

    def layer(self, weight: Tensor) -> Layer:
        """The weight (outputs, inputs) in its compressed form."""
        shape = (weight.shape[0], weight.shape[1])
        if self.bits is None:
            size = weight.abs()
            mask = size > size.flatten().kthvalue(round((self.sparsity or 0) * weight.numel())).values
            return Layer(shape, mask=mask, values=weight[mask])
        groups = weight.reshape(-1, GROUP)
        scale, zero = fit(groups.T, self.bits, sym=False, mse=False)
        codes = (groups / scale[:, None]).round_().add_(zero[:, None]).clamp_(0, 2**self.bits - 1)
        rows = (weight.shape[0], -1)
        return Layer(
            shape, bits=self.bits, codes=codes.to(torch.uint8).view(shape), scale=scale.half().view(rows),
            zero=zero.to(torch.uint8).view(rows),
        )  # fmt: skip


class Bench:
    """The grid of the matrix, its store with targets and prompts, and where they are stored."""

    def __init__(self, folder: Path, seq_len: int, windows: int) -> None:
        text = {"seq_len": seq_len, "count": windows}
        grid = {
            "models": MODEL,
            "compression": TARGETS,
            "sources": [],
            "recovery": [{"method": "random_prompt", "k": K, "seed": seed} for seed in range(6)],
            "measures": [
                {"method": "perplexity", "text": {**text, "dataset": name, **more}} for name, more in TEXTS.items()
            ],
        }
        (folder / "transfer.yaml").write_text(yaml.safe_dump(grid))
        pins = Pins()
        self.plan = plan.make(gridfile.load(str(folder / "transfer.yaml"), [], pins), pins)
        self.store = Store(str(folder / "store"))
        self.runtime = Runtime(device="cpu", batch=BATCH, locations=pins.locations, datasets=pins.datasets)

    def prepare(self) -> None:
        """Make targets and prompts, and read every text once, so that neither side pays for a package's first use."""
        for cell in self.plan.cells():
            if not isinstance(cell, Evaluate):
                execute(cell, self.store, self.runtime, lambda event: None)
            elif isinstance(cell.measure, Perplexity):
                self.documents(cell.measure.text)
        loading.forget()

    def documents(self, text: Windows) -> list[str]:
        """The documents of a text."""
        corpus = find(text.dataset)
        return read_documents(location(self.runtime.locations, text), corpus, text.split, text.documents)

    def tasks(self) -> Iterator[list[Evaluate]]:
        """The cells with a prompt, one target after the other, as a grid with one worker hands them out."""
        nodes = self.plan.nodes
        todo = {k for k, n in nodes.items() if isinstance(n.cell, Evaluate) and n.cell.recovery}
        done = {k for k, n in nodes.items() if not isinstance(n.cell, Evaluate)}
        search = GraphSearch(
            self.plan, todo, done, Settings(1, {k: {} for k in nodes}, fail_fast=True), lambda event: None
        )
        while search.waiting:
            search.suggest("task")
            keys = search.tasks["task"]
            yield [c for k in keys if isinstance(c := nodes[k].cell, Evaluate)]
            for k in keys:
                search.on_trial_result("task", {"events": [Done(k)]})
            search.on_trial_complete("task")

    def place(self, target: Compress) -> str:
        """What `ctp.load` finds a target by."""
        return MODEL if isinstance(target.compression, Dense) else self.store.folder(ref(target))
