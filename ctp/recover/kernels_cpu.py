"""The kernels of ctp.recover.kernels, compiled by numba once per machine and read from its cache at import.

A row is read as bfloat16, computed in fp32 in the first-level cache, and rounded to nearest even where it is written;
the forward pass rounds in between where the model's own modules do. Later than at import, what loading takes would lie
between the tensors of a step, and its memory would stay in the heap as holes.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

TILE = 16  # rows that a thread takes at a time
# A task is 64-bit places: the first row that is not taken, sizes, a float, then addresses.
NEXT, ROWS, COLUMNS, QUERIES, REAL, ADDRESS, PLACES = 0, 1, 2, 3, 4, 5, 10
PIECE = 1024  # numbers at a time of a long row
_F = np.float32
_LOG2E, _ONE, _LEAST = _F(1.4426950408889634), _F(1), _F(-87)
_LN2, _REST = _F(0.693359375), _F(-2.12194440054690583e-4)  # ln 2 is their sum; the first has few digits
# (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, from the highest power: the coefficients of expf in the Cephes library.
_P0, _P1, _P2, _P3, _P4, _P5 = (
    _F(x)
    for x in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


# ------------------------------------------------------------------ parts of kernels


@njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _exp(x: Any) -> Any:
    """e^x of x <= 0; 0 below -87."""
    n = np.rint(x * _LOG2E)
    r = x - n * _LN2 - n * _REST
    y = (((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5) * (r * r) + r + _ONE
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)
    return y * power if not x < _LEAST else _F(0)


@njit(fastmath={"reassoc", "contract"}, cache=True)
def _sum(x: Any) -> Any:
    total = _F(0)
    for j in range(len(x)):
        total += x[j]
    return total


@njit(fastmath={"reassoc", "contract"}, cache=True)
def _dot(x: Any, y: Any) -> Any:
    total = _F(0)
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@njit(cache=True)
def _widen(raw: Any, bits: Any) -> None:
    """Bits of bfloat16 to those of fp32; bits may be longer."""
    for j in range(len(raw)):
        bits[j] = np.uint32(raw[j]) << 16


@njit(cache=True)
def _round(bits: Any, raw: Any) -> None:
    """Bits of fp32 to those of the nearest bfloat16, of two the even one; bits may be longer."""
    for j in range(len(raw)):
        raw[j] = (bits[j] + 0x7FFF + ((bits[j] >> 16) & 1)) >> 16


@njit(cache=True)
def _drop(bits: Any) -> None:
    """Round numbers to bfloat16, in fp32."""
    for j in range(len(bits)):
        bits[j] = (bits[j] + 0x7FFF + ((bits[j] >> 16) & 1)) & 0xFFFF0000


@njit(cache=True)
def _maximum(raw: Any) -> Any:
    """The largest of a row, as integers, which are in the numbers' order once the negative ones are turned round."""
    signed, best = raw.view(np.int16), np.int16(-0x8000)
    for j in range(len(signed)):
        best = max(best, np.int16(signed[j] ^ ((signed[j] >> 15) & 0x7FFF)))
    return np.int32((best ^ ((best >> 15) & 0x7FFF)) << 16).view(np.float32)


# -------------------------------------------------------------------------- kernels


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """The address as a pointer."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


@intrinsic
def _claim(typing: Any, task: Any) -> Any:
    """The first of the next TILE rows: what NEXT holds, which grows, in one step for all threads."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.bitcast(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), TILE), "monotonic")

    return types.int64(types.voidptr), code


@njit(cache=True)
def _matrix(task: Any, number: int) -> Any:
    return carray(_pointer(task[ADDRESS + number]), (task[ROWS], task[COLUMNS]), np.uint16)


@njit(cache=True)
def _vector(task: Any, number: int) -> Any:
    return carray(_pointer(task[ADDRESS + number]), (task[COLUMNS],), np.uint16)


# Each takes the address of a task, and of its rows those that no other thread has taken.

_kernel = cfunc(types.void(types.voidptr), cache=True, error_model="numpy")


@_kernel
def exponentials(data: Any) -> None:
    task = carray(data, (PLACES,), np.int64)
    z, columns = _matrix(task, 0), task[COLUMNS]
    tops = carray(_pointer(task[ADDRESS + 1]), (task[ROWS],), np.float32)
    sums = carray(_pointer(task[ADDRESS + 2]), (task[ROWS],), np.float32)
    bits = np.empty(PIECE, np.uint32)
    x = bits.view(np.float32)
    first = _claim(data)
    while first < task[ROWS]:
        for i in range(first, min(first + TILE, task[ROWS])):
            top, total = _maximum(z[i]), _F(0)
            for begin in range(0, columns, PIECE):
                part = z[i, begin : begin + PIECE]
                n = len(part)
                _widen(part, bits)
                for j in range(n):
                    x[j] = _exp(x[j] - top)
                total += _sum(x[:n])
                _round(bits, part)
            tops[i], sums[i] = top, total
        first = _claim(data)


@_kernel
def rms_norm(data: Any) -> None:
    task = carray(data, (PLACES,), np.int64)
    x, weight, out, n = _matrix(task, 0), _vector(task, 1), _matrix(task, 2), task[COLUMNS]
    eps = task.view(np.float64)[REAL]
    x_bits, weight_bits = np.empty(n, np.uint32), np.empty(n, np.uint32)
    v, w = x_bits.view(np.float32), weight_bits.view(np.float32)
    _widen(weight, weight_bits)
    first = _claim(data)
    while first < task[ROWS]:
        for i in range(first, min(first + TILE, task[ROWS])):
            _widen(x[i], x_bits)
            inverse = _F(1 / np.sqrt(_dot(v, v) / n + eps))
            for j in range(n):
                v[j] *= inverse
            _drop(x_bits)
            for j in range(n):
                v[j] *= w[j]
            _round(x_bits, out[i])
        first = _claim(data)


@_kernel
def rms_norm_gradient(data: Any) -> None:
    task = carray(data, (PLACES,), np.int64)
    x, grad, weight = _matrix(task, 0), _matrix(task, 1), _vector(task, 2)
    base, out = _matrix(task, 3), _matrix(task, 4)
    n, eps = task[COLUMNS], task.view(np.float64)[REAL]
    x_bits, weight_bits = np.empty(n, np.uint32), np.empty(n, np.uint32)
    grad_bits, base_bits = np.empty(n, np.uint32), np.empty(n, np.uint32)
    v, w = x_bits.view(np.float32), weight_bits.view(np.float32)
    g, y = grad_bits.view(np.float32), base_bits.view(np.float32)
    _widen(weight, weight_bits)
    first = _claim(data)
    while first < task[ROWS]:
        for i in range(first, min(first + TILE, task[ROWS])):
            _widen(grad[i], grad_bits)
            _widen(x[i], x_bits)
            _widen(base[i], base_bits)
            for j in range(n):
                g[j] *= w[j]
            inverse = _F(1 / np.sqrt(_dot(v, v) / n + eps))
            mean = _F(_dot(g, v) * inverse * inverse / n)
            for j in range(n):
                y[j] += (g[j] - v[j] * mean) * inverse
            _round(base_bits, out[i])
        first = _claim(data)


@_kernel
def causal_softmax(data: Any) -> None:
    task = carray(data, (PLACES,), np.int64)
    z, out, n, queries = _matrix(task, 0), _matrix(task, 1), task[COLUMNS], task[QUERIES]
    scale = _F(task.view(np.float64)[REAL])
    bits = np.empty(n, np.uint32)
    x = bits.view(np.float32)
    first = _claim(data)
    while first < task[ROWS]:
        for i in range(first, min(first + TILE, task[ROWS])):
            seen = n - queries + i % queries + 1
            top = _maximum(z[i, :seen])
            _widen(z[i, :seen], bits)
            for j in range(seen):
                x[j] = _exp((x[j] - top) * scale)
            inverse = _ONE / _sum(x[:seen])
            for j in range(seen):
                x[j] *= inverse
            _round(bits[:seen], out[i, :seen])
            out[i, seen:] = 0
        first = _claim(data)
