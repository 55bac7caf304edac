"""What tests share: see the names."""

from ctp.cells.cell import Compress, Evaluate, Learn
from ctp.cells.inputs import Model

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
