"""Whether Triton can compile and launch kernels for this process's GPU."""

import warnings
from functools import cache

import torch

from ctp.common.messages import brief


@cache
def works() -> bool:
    """Tries one small kernel on the current GPU, once a process. Where it fails, for example because there is no C
    compiler, warns once and returns False: callers then use slower PyTorch code.
    """
    if not torch.cuda.is_available():
        return False
    try:
        from ctp.machine.triton_trial import add_one

        one = add_one(torch.zeros(1, device="cuda"))
        assert float(one) == 1.0, "a trial kernel computed a wrong number"
    except Exception as e:  # Triton, the compilers that it calls and CUDA's driver raise kinds of their own
        warnings.warn(f"Triton cannot run on this GPU, so slower PyTorch code runs instead: {brief(e)}", stacklevel=2)
        return False
    return True
