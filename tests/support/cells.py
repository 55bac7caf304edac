"""Cells of the three kinds, made without a grid or files, and artifacts of them."""

from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.cells.inputs import Model
from ctp.storage.ref import identity, ref

MODEL = Model(name="m", revision="r1", dtype="float32")
TEXT = {"dataset": "t", "split": "train", "seq_len": 16, "join": " ", "revision": "r2"}
CALIBRATION = {**TEXT, "count": 4, "sampling": "crops"}


def compress(**fields):
    spec = {"method": "gptq", "bits": 3, **fields}
    return Compress(model=MODEL, compression=spec, calibration=CALIBRATION)


def learn(source=None, **fields):
    spec = {"method": "soft_prompt", "k": 4, "text": TEXT, "validation": {"revision": "r3", "join": " "}, **fields}
    return Learn(source=source or compress(), recovery=spec)


def evaluate(target=None, recovery=None):
    measure = {"method": "perplexity", "text": {**TEXT, "split": "test"}}
    return Evaluate(target=target or compress(), recovery=recovery, measure=measure)


def publish(store, cell, text="payload"):
    """An artifact of one file that says `text`."""
    with store.publish(ref(cell), identity(cell)) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "a.txt").write_text(text)
        draft.record["metrics"] = {"x": 1.5}
