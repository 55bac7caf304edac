"""A short run of learning a prompt on a tiny model, with what a test wants to change about it."""

from support.tiny import random_windows, tiny_llama

from ctp.cells import SoftPrompt
from ctp.cells.runtime import Runtime
from ctp.learning.soft_prompt import learn

CPU = Runtime(device="cpu", checkpoint_seconds=0.0)
S = 12


def spec(**fields):
    text = {"dataset": "d", "split": "train", "seq_len": S}
    return SoftPrompt(**{"k": 4, "text": text, "steps": 6, "validate_every": 2, "lr": 0.05, **fields})


def run(model=None, train=None, validation=None, **fields):
    options = {n: fields.pop(n) for n in ("resume", "checkpoint", "report", "tokenizer") if n in fields}
    train = random_windows(10, S, seed=1) if train is None else train
    validation = random_windows(5, S, seed=2) if validation is None else validation
    return learn(model or tiny_llama(), train, validation, spec(**fields), runtime=CPU, **options)
