"""The two sides of the transfer benchmark do the same sums; its times need the real model and a quiet machine."""

import pytest
import torch

from benchmarks import matrix, transfer
from ctp.cells import Compression


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "MODEL", "tiny-llama")
    monkeypatch.setattr(matrix, "TARGETS", [{"method": "rounded", "bits": 3}, {"method": "rounded", "sparsity": 0.5}])
    monkeypatch.setattr(matrix, "TEXTS", {name: {"split": "test"} for name in ("newswire", "pydoc")})
    return matrix.Bench(tmp_path, seq_len=20, windows=5)


def test_the_plain_loop_and_the_cells_of_a_grid_agree(bench):
    bench.prepare()
    sides = transfer.Side(), transfer.Side()
    for cells in bench.tasks():
        transfer.plain(bench, cells, sides[0])
        transfer.ours(bench, cells, sides[1])
    plain, ours = (side.nll for side in sides)
    assert plain.keys() == ours.keys()
    assert len(plain) == 2 * 6 * 2
    assert len(set(plain.values())) == len(plain)
    assert list(ours.values()) == pytest.approx([plain[n] for n in ours], rel=1e-5)  # fp32 sums in another order
    assert all(side.seconds[step] > 0 for side in sides for step in ("load", "tokenise", "windows"))
    assert len(sides[0].targets) == len(sides[1].targets) == 2


@pytest.mark.parametrize(("bits", "sparsity"), [(4, None), (2, None), (None, 0.75)])
def test_targets_are_rounded_to_the_nearest(bits, sparsity):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    layer = Compression.registry["rounded"](bits=bits, sparsity=sparsity).layer(weight)
    dense = layer.dense(torch.float32)
    if sparsity:
        assert int((dense == 0).sum()) == round(sparsity * 6 * 128)
        assert torch.equal(dense[dense != 0], weight[dense != 0])
        assert weight[dense == 0].abs().max() < weight[dense != 0].abs().min()
    else:
        groups = weight.view(6, 2, 64)
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        # Half a step; the zero point is rounded too, which may cut half a step off one end of the range.
        assert ((dense.view(6, 2, 64) - groups).abs() <= 1.01 * step[..., None]).all()
        assert all(len(row.unique()) <= 2**bits for row in dense.view(12, 64))
