"""The walk through whole models: every architecture, every method, and a real small model."""

import copy

import pytest
import torch
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt
from support.trained import load, pruned, windows
from torch import nn

from ctp.architectures.blocks import decoder_blocks
from ctp.architectures.calls import Batch, Call
from ctp.architectures.chain import capture, check_chain
from ctp.cells import GPTQ, Solver, SparseGPT
from ctp.compression.calibration import packed_linears, shared_inputs
from ctp.compression.walk import compress_block, compress_model, hessians
from ctp.evaluation.perplexity import perplexity
from ctp.formats.pack import pack, stats, unpack

MODELS = {
    "llama": (tiny_llama, "model.layers", 7),
    "opt": (tiny_opt, "model.decoder.layers", 6),
    "opt_projected": (lambda: tiny_opt(embed=16), "model.decoder.layers", 6),
    "bloom": (tiny_bloom, "transformer.h", 4),
}
SPECS: list[Solver] = [
    GPTQ(bits=3),
    GPTQ(bits=4, group_size=16, act_order=True, true_sequential=True),
    GPTQ(bits=2, group_size=8, sym=True, scale="mse", static_groups=True, act_order=True),
    SparseGPT(sparsity=0.5),
    SparseGPT(pattern="2:4", true_sequential=True),
    SparseGPT(sparsity=0.3, bits=4),
]


@pytest.fixture(autouse=True)
def one_thread():
    """More only wait for one another on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=MODELS)
def case(request):
    make, prefix, count = MODELS[request.param]
    return make(), prefix, count


def logits(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=windows).logits


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label)
def test_only_the_blocks_linears_change_and_the_layers_hold_them(case, spec):
    model, prefix, count = case
    before = copy.deepcopy(model.state_dict())
    layers = compress_model(model, random_windows(6, 32), spec, batch=4)
    assert decoder_blocks(model)[0] == prefix
    assert len(layers) == 2 * count
    after = model.state_dict()
    assert {n for n in after if not torch.equal(after[n], before[n])} == {f"{n}.weight" for n in layers}
    back = unpack(pack(layers))
    for name in layers:
        assert name.startswith(f"{prefix}.")
        assert torch.equal(back[name].dense(torch.float32), after[f"{name}.weight"])
    sizes = stats(pack(layers), {}, model.dtype)
    assert sizes["sparsity"] == pytest.approx(zeros_of(spec), abs=2e-3)
    assert sizes["packed_bytes"] < sizes["dense_bytes"]


def zeros_of(spec: Solver) -> float:
    if not isinstance(spec, SparseGPT):
        return 0.0
    return spec.sparsity or spec.n_of_m[0] / spec.n_of_m[1]


def test_each_block_sees_the_compressed_ones_before_it(case):
    """The last block's Hessians are those of its inputs in the model as it is after compression."""
    model, _, _ = case
    windows = random_windows(5, 24)
    other = copy.deepcopy(model)
    compress_model(model, windows, GPTQ(bits=2))
    expected = copy.deepcopy(model)
    # Last block original, all before it compressed: compressing only that block must give the same weights.
    blocks, original = decoder_blocks(expected)[1], decoder_blocks(other)[1]
    blocks[-1].load_state_dict(original[-1].state_dict())
    batches = capture(expected, windows, 5)
    with torch.no_grad():
        for block in blocks[:-1]:
            for b in batches:
                b.hidden = b.run(block)
        compress_block(blocks[-1], batches, GPTQ(bits=2), "last", batches[0])
    got = decoder_blocks(model)[1][-1].state_dict()
    for name, value in blocks[-1].state_dict().items():
        agree = torch.isclose(value, got[name], rtol=1e-4, atol=1e-5).float().mean()
        assert agree > 0.99, name  # batches add up in another order: a tie may round the other way


def test_the_result_does_not_depend_on_the_batch_size(case):
    model, _, _ = case
    other = copy.deepcopy(model)
    windows = random_windows(7, 16)
    with torch.no_grad():
        sums = [
            hessians(decoder_blocks(m)[1][0], capture(m, windows, n), groups_of(m, windows))[0]
            for m, n in ((model, 7), (other, 2))
        ]
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def groups_of(model: nn.Module, windows: torch.Tensor) -> list[list[str]]:
    with torch.no_grad():
        return shared_inputs(decoder_blocks(model)[1][0], capture(model, windows, 2)[0])


def test_linears_on_one_input_share_a_hessian():
    windows = random_windows(2, 8)
    attention = [f"self_attn.{p}_proj" for p in "qkv"]
    assert groups_of(tiny_llama(), windows) == [
        attention,
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    got = groups_of(tiny_opt(), windows)
    assert [sorted(g) for g in got] == [sorted(attention), ["self_attn.out_proj"], ["fc1"], ["fc2"]]
    assert groups_of(tiny_bloom(), windows) == [
        ["self_attention.query_key_value"],
        ["self_attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ]


def test_a_hessian_is_the_mean_over_tokens(case):
    model, _, _ = case
    windows, name = random_windows(3, 12), groups_of(model, random_windows(2, 8))[-1][0]
    block = decoder_blocks(model)[1][0]
    seen: list[torch.Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, windows)
    handle.remove()
    x = seen[0].reshape(36, -1).double()
    with torch.no_grad():
        got = hessians(block, capture(model, windows, 2), [[name]])[0][0]
    torch.testing.assert_close(got.double(), x.T @ x / 36, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [300, 1100])
def test_a_hessian_of_many_stripes_is_whole_and_symmetric(columns):
    """Stripes end within these widths; a third of the tokens comes in a batch of its own."""
    torch.manual_seed(0)
    x, linear = torch.randn(9, 7, columns), nn.Linear(columns, 2)
    block = nn.Sequential(linear)
    batches = [Batch(part, {block: Call()}) for part in x.split([3, 6])]
    with torch.no_grad():
        got = hessians(block, batches, [["0"]])[0][0]
    exact = x.flatten(0, 1).double()
    assert torch.equal(got, got.T)
    torch.testing.assert_close(got.double(), exact.T @ exact / 63, rtol=0, atol=1e-5)  # sums of 63 terms around 1


def test_high_precision_quantization_hardly_changes_the_model(case):
    model, _, _ = case
    windows = random_windows(8, 48)
    before = logits(model, windows)
    compress_model(model, windows, GPTQ(bits=8))
    assert (logits(model, windows) - before).norm() < 0.1 * before.norm()


def test_bfloat16_models_compress_in_their_dtype():
    model = tiny_llama().bfloat16()
    layers = compress_model(model, random_windows(8, 48), SparseGPT(sparsity=0.5, bits=4))
    for name, layer in layers.items():
        assert torch.equal(layer.dense(torch.bfloat16), model.get_parameter(f"{name}.weight"))


def test_packed_linears_give_the_same_and_leave_no_trace(case):
    """Products summed in another order: float32 has 2^-24."""
    model, _, _ = case
    windows = random_windows(4, 24)
    before = logits(model, windows)
    with packed_linears(model):
        changed = [m for m in model.modules() if "forward" in m.__dict__]
        torch.testing.assert_close(logits(model, windows), before, rtol=1e-4, atol=1e-5)
    assert len(changed) > 4
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model, windows), before)


@pytest.mark.parametrize("threads", [1, 2])
def test_compressing_twice_gives_the_same_bytes(threads):
    torch.set_num_threads(threads)
    results = []
    for _ in range(2):
        model = tiny_llama()
        results.append(
            pack(compress_model(model, random_windows(6, 32), SparseGPT(sparsity=0.5, bits=3, group_size=8)))
        )
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


def test_progress_training_mode_and_hooks_are_as_before():
    model, seen = tiny_opt().train(), []
    compress_model(model, random_windows(2, 16), GPTQ(bits=4), progress=lambda *a: seen.append(a))
    assert seen == [(1, 2), (2, 2)]
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_errors_name_the_linear_before_anything_changes():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: group_size = 24 .* 32 inputs; allowed"):
        compress_model(model, random_windows(2, 16), GPTQ(bits=4, group_size=24))
    with pytest.raises(ValueError, match="windows must be token ids"):
        compress_model(model, torch.zeros(0, 16, dtype=torch.long), GPTQ(bits=4))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    model.model.layers[0].input_layernorm.weight.data.fill_(torch.nan)
    with pytest.raises((ValueError, RuntimeError), match=r"holds numbers that are not finite"):
        compress_model(model, random_windows(2, 16), GPTQ(bits=4))


def test_a_model_that_is_no_chain_of_blocks_is_refused():
    model = tiny_llama()
    second = model.model.layers[1]
    second.register_forward_pre_hook(lambda _, args: (args[0], *args[1:]))
    check_chain(model, random_windows(1, 16))
    inner, forward = model.model.layers[1], model.model.layers[1].forward
    calls: list[int] = []

    def changing(hidden, **kwargs):
        calls.append(1)
        return forward(hidden * len(calls), **kwargs)

    inner.forward = changing
    with pytest.raises(ValueError, match="block 1 on its own differs"):
        compress_model(model, random_windows(1, 16), GPTQ(bits=4))


def test_linears_that_are_never_run_are_named():
    model = tiny_llama()
    model.model.layers[0].spare = nn.Linear(128, 128)
    with pytest.raises(ValueError, match=r"does not run these linears .*: model\.layers\.0\.spare"):
        compress_model(model, random_windows(1, 16), GPTQ(bits=4))


def test_matrices_that_are_no_linears_are_refused():
    """Else a model would be compressed in part, and reported as compressed."""
    model = tiny_llama()
    model.model.layers[1].mlp.experts = nn.Parameter(torch.zeros(8, 64, 32))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts is not the weight of a linear"):
        compress_model(model, random_windows(1, 16), GPTQ(bits=4))


def test_a_real_model_orders_the_methods(trained):
    model, calibration, evaluation = load(trained), windows("train", 96), windows("test", 64)

    def ppl(spec: Solver) -> float:
        small = copy.deepcopy(model)
        compress_model(small, calibration, spec, batch=16)
        return perplexity(small, evaluation).ppl

    dense, magnitude = perplexity(model, evaluation).ppl, perplexity(pruned(trained), evaluation).ppl
    fine, coarse = ppl(GPTQ(bits=3)), ppl(GPTQ(bits=2))
    sequential = ppl(GPTQ(bits=3, true_sequential=True, act_order=True, scale="mse"))
    half, most = ppl(SparseGPT(sparsity=0.5)), ppl(SparseGPT(sparsity=0.75))
    joint, regular = ppl(SparseGPT(sparsity=0.5, bits=3)), ppl(SparseGPT(pattern="2:4"))
    assert dense < fine < coarse
    assert dense < sequential < coarse
    assert dense < half < most
    assert half < joint
    assert half < regular
    assert half - dense < 0.6 * (magnitude - dense)
