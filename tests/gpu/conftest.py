import gc
import time

import pytest
import torch


def pytest_collection_modifyitems(items):
    """All tests here need a GPU, those marked `two_gpus` two."""
    for item in items:
        if "gpu" in item.path.parts[-2:-1]:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU is visible"))
            elif "two_gpus" in item.keywords and torch.cuda.device_count() < 2:
                item.add_marker(pytest.mark.skip(reason="needs two GPUs; one is visible"))


@pytest.fixture(autouse=True)
def memory(request):
    """A GPU without leftovers; prints each test's seconds and peak memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    yield
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"[{request.node.name}: {time.perf_counter() - begun:.0f} s, peak {peak:.1f} GiB]")
