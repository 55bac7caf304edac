"""Small helpers around transformers: models without weights, on a device, without progress bars."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ctp.common.messages import brief_list


def place(model: Any, device: str) -> Any:
    """The model on `device`; spread over the GPUs where this process has been given several."""
    import torch

    if device != "cuda" or torch.cuda.device_count() < 2:
        return model.to(device)
    from accelerate import dispatch_model, infer_auto_device_map

    split = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, device_map=split)


def skeleton(config: Any) -> Any:
    """The ordinary model of a configuration, without weights: its modules, names and shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_complete(name: str, info: Mapping[str, Any]) -> None:
    """Raise ValueError where `info`, of `from_pretrained`, lists missing weights: transformers fills in random ones."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the weights of {name} are incomplete: {brief_list(missing)} missing")


LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # without the latter transformers asks


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars, and with errors only."""
    from transformers.utils import logging

    bars, before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
