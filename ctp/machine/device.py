"""The device that work runs on."""


def pick(device: str) -> str:
    """ "cpu" or "cuda" for "cpu", "cuda" or "auto", which takes the GPU where this process sees one.

    Raises ValueError where the GPU that is asked for is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {device!r}: allowed: auto, cpu, cuda")
    if device == "cpu":
        return device
    import torch

    if not torch.cuda.is_available() and device == "cuda":
        raise ValueError("device = 'cuda': no GPU is visible")
    return "cuda" if torch.cuda.is_available() else "cpu"
