"""Time to pack one linear layer of LLaMA-7B's shape and to unpack it to a dense float16 weight.

    python -m benchmarks.packing [--device cpu|cuda] [--repeats N] [--threads N]

Prints a markdown table: the median time of each, half its range over it, and gigabytes of the dense float16 weight
per second, next to clone() of that weight, which is the memory's speed, and where compressed-tensors is
installed, to its pack_to_int32 and unpack_from_int32. Those handle the codes alone: unpacking does not compute weights,
scales and zero points stay outside, and nothing is sparse: their peer is `unpack`, the step before `to float16`, which
is unpacking and computing the dense weight. `x clone` is a time over the clone's.
"""

import argparse
import importlib
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor

from ctp.compression import Layer, pack, unpack

SHAPE, GROUP = (11008, 4096), 128
HELPERS = "compressed_tensors.compressors.pack_quantized.helpers"
ROWS: dict[str, tuple[int | None, float]] = {  # bits, share of the weights that is pruned
    "4 bit": (4, 0),
    "3 bit": (3, 0),
    "2 bit": (2, 0),
    "50 % sparse float16": (None, 0.5),
    "50 % sparse, 4 bit": (4, 0.5),
}


def random_layer(bits: int | None, sparsity: float, device: str) -> Layer:
    """A layer of random codes, scales, zero points and mask."""
    mask = torch.rand(SHAPE, device=device) >= sparsity if sparsity else None
    if bits is None:
        assert mask is not None
        return Layer(SHAPE, mask=mask, values=torch.randn(int(mask.count_nonzero()), device=device).half())
    groups = SHAPE[0], SHAPE[1] // GROUP
    codes = torch.randint(2**bits, SHAPE, dtype=torch.uint8, device=device)
    return Layer(
        SHAPE,
        bits=bits,
        codes=codes if mask is None else codes * mask,
        scale=torch.rand(groups, device=device).half(),
        zero=torch.randint(2**bits, groups, dtype=torch.uint8, device=device),
        mask=mask,
    )


def measure(work: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each repeat, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def ours(layer: Layer) -> list[Callable[[], object]]:
    """Packing, unpacking, unpacking to a dense weight."""
    packed = pack({"w": layer})
    return [
        lambda: pack({"w": layer}),
        lambda: unpack(packed),
        lambda: unpack(packed)["w"].dense(torch.float16),
    ]


def theirs(layer: Layer) -> list[Callable[[], object]]:
    """compressed-tensors on the same codes: packing, unpacking; nothing for layers that it does not pack so."""
    if layer.codes is None or layer.mask is not None:
        return []
    helpers, bits, shape = importlib.import_module(HELPERS), layer.bits or 0, layer.codes.shape
    codes = (layer.codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = helpers.pack_to_int32(codes, bits)
    return [lambda: helpers.pack_to_int32(codes, bits), lambda: helpers.unpack_from_int32(packed, bits, shape)]


def cell(seconds: list[float], clone: float) -> str:
    """The median, its spread, the speed and the ratio to the clone."""
    median = statistics.median(seconds)
    spread, speed = (max(seconds) - min(seconds)) / median, 2e-9 * SHAPE[0] * SHAPE[1] / median
    return f"{1e3 * median:.1f} ms ±{spread / 2:.0%}, {speed:.1f} GB/s, {median / clone:.1f} x clone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weight: Tensor = torch.randn(SHAPE, device=args.device).half()
    seconds = measure(weight.clone, args.repeats, args.device)
    clone = statistics.median(seconds)
    try:
        name, note = f"compressed-tensors {version('compressed-tensors')}", ""
    except ImportError:
        name, note = "", " compressed-tensors is not installed: no column for it."
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(
        f"{platform.machine()}, {where}; torch {torch.__version__}; {SHAPE[0]} x {SHAPE[1]}, groups of {GROUP};",
        end=" ",
    )
    print(f"clone: {cell(seconds, clone)}.{note}\n")
    head = ["layer", "pack", "unpack", "to float16", *([f"{name}: pack", f"{name}: unpack"] if name else [])]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row, (bits, sparsity) in ROWS.items():
        layer = random_layer(bits, sparsity, args.device)
        works = [*ours(layer), *(theirs(layer) if name else [])]
        cells = [cell(measure(work, args.repeats, args.device), clone) for work in works]
        print(f"| {' | '.join([row, *cells, *['-'] * (len(head) - 1 - len(cells))])} |", flush=True)


if __name__ == "__main__":
    main()
