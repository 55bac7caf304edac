"""What compressed linears take on disk, and the time to pack and to unpack one of LLaMA-7B's shape.

    python -m benchmarks.packing [--device cpu|cuda] [--repeats N] [--threads N] [--sizes]

With --sizes prints the bits per weight of all linears of SmolLM2-135M and of a LLaMA-7B block, scales, zero points and
masks included, and what that saves against float16; both follow from the shapes. Else prints a markdown table of times:
the median of each, half its range over it, and gigabytes of the dense float16 weight per second, next to clone() of
that weight, which is the memory's speed, and where compressed-tensors is installed, to its pack_to_int32 and
unpack_from_int32. Those handle the codes alone: unpacking computes no weights, scales and zero points stay outside,
and nothing is sparse: their peer is `unpack`, the step before `to float16`, which is unpacking and computing the dense
weight. `x clone` is a time over the clone's.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.report import environment, head, row, timed
from ctp.formats.layer import Layer
from ctp.formats.pack import pack, stats, unpack

SHAPE, GROUP = (11008, 4096), 128
HELPERS = "compressed_tensors.compressors.pack_quantized.helpers"
LINEARS = {  # shapes of all linears of a block, and the group size that divides them
    "SmolLM2-135M, groups of 64": ([(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)], 64),
    "LLaMA-7B block, groups of 128": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 128),
}
ROWS: dict[str, tuple[int | None, float]] = {  # bits, share of the weights that is pruned
    "4 bit": (4, 0),
    "3 bit": (3, 0),
    "2 bit": (2, 0),
    "50 % sparse float16": (None, 0.5),
    "75 % sparse float16": (None, 0.75),
    "50 % sparse, 4 bit": (4, 0.5),
}


def random_layer(
    bits: int | None, sparsity: float, device: str = "cpu", shape: tuple[int, int] = SHAPE, group: int = GROUP
) -> Layer:
    """A layer of random codes, scales, zero points and mask."""
    mask = torch.rand(shape, device=device) >= sparsity if sparsity else None
    if bits is None:
        assert mask is not None
        return Layer(shape, mask=mask, values=torch.randn(int(mask.count_nonzero()), device=device).half())
    groups = shape[0], shape[1] // group
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, device=device)
    return Layer(
        shape,
        bits=bits,
        codes=codes if mask is None else codes * mask,
        scale=torch.rand(groups, device=device).half(),
        zero=torch.randint(2**bits, groups, dtype=torch.uint8, device=device),
        mask=mask,
    )


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


def print_sizes() -> None:
    """Bits per weight and ratio to float16, of every row for every model's linears."""
    print(head(["linears", *LINEARS]))
    for name, (bits, sparsity) in ROWS.items():
        cells = []
        for shapes, group in LINEARS.values():
            linears = {f"{i}": random_layer(bits, sparsity, shape=shape, group=group) for i, shape in enumerate(shapes)}
            sizes = stats(pack(linears), {}, torch.float16)
            cells.append(f"{sizes['bits_per_weight']:.2f} bits, {sizes['linear_ratio']:.2f}x")
        print(row([name, *cells]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--sizes", action="store_true", help="bits per weight, and no times")
    args = parser.parse_args()
    if args.sizes:
        print_sizes()
    else:
        print_times(args.device, args.repeats, args.threads)


def print_times(device: str, repeats: int, threads: int) -> None:
    """Every row's times, next to the clone's and those of compressed-tensors."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def measure(work: Callable[[], object]) -> list[float]:
        return timed(work, repeats + 1, device)[1:]  # the first does not count

    weight: Tensor = torch.randn(SHAPE, device=device).half()
    seconds = measure(weight.clone)
    clone = statistics.median(seconds)
    peer = find_spec("compressed_tensors") is not None
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    print(gpu + environment("torch", *["compressed-tensors"] * peer), f"{threads} threads", sep="; ", end="; ")
    print(f"{SHAPE[0]} x {SHAPE[1]}, groups of {GROUP}; clone: {cell(seconds, clone)}\n")
    theirs_too = ["compressed-tensors: pack", "compressed-tensors: unpack"] if peer else []
    print(head(["layer", "pack", "unpack", "to float16", *theirs_too]))
    for name, (bits, sparsity) in ROWS.items():
        layer = random_layer(bits, sparsity, device)
        works = [*ours(layer), *(theirs(layer) if peer else [])]
        cells = [cell(measure(work), clone) for work in works]
        print(row([name, *cells, *["-"] * (3 + len(theirs_too) - len(cells))]), flush=True)


if __name__ == "__main__":
    main()
