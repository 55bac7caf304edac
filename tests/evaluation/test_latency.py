"""Latency: what is fed and kept is what the numbers say, and the numbers are those of the list."""

import statistics

import pytest
import torch
from support.measured import ARCHITECTURES, job_for, loaded, read_json, rows_for
from support.tiny import tiny_llama

from ctp.cells import Latency
from ctp.evaluation import latency as module
from ctp.evaluation.latency import latency, tokens
from ctp.execution import measure
from ctp.machine import record
from ctp.prompts.prefix import with_prompt


@pytest.fixture
def fed(monkeypatch):
    """What the model is given, call by call: (shape of ids or embeddings, cached positions before, kwargs)."""
    calls = []

    def watch(model):
        plain = model.forward

        def forward(input_ids=None, inputs_embeds=None, past_key_values=None, use_cache=None, logits_to_keep=0):
            given = input_ids if inputs_embeds is None else inputs_embeds
            cached = 0 if past_key_values is None else past_key_values.get_seq_length()
            calls.append((tuple(given.shape[:2]), cached, logits_to_keep, given.clone()))
            return plain(input_ids=input_ids, inputs_embeds=inputs_embeds, past_key_values=past_key_values,
                         use_cache=use_cache, logits_to_keep=logits_to_keep)  # fmt: skip

        monkeypatch.setattr(model, "forward", forward)
        return calls

    return watch


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("k", [0, 64])
def test_the_prompt_makes_what_is_read_k_longer(name, k, fed):
    model, _ = loaded(name)
    calls = fed(model)
    result = latency(model, 40, 5, rows_for(model, k) if k else None, batch=2, warmup=1, repeats=2)
    first = (2, k + 40), 0, 1
    then = [((2, 1), k + 40 + i, 1) for i in range(5)]
    assert [call[:3] for call in calls] == 3 * [first, *then]
    assert (result.prompt_tokens, result.cached_tokens) == (k, k + 45)
    config = model.config
    layers = config.num_hidden_layers
    assert result.cache_bytes == 2 * 2 * layers * (k + 45) * config.hidden_size * 4  # keys and values, two rows, fp32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_is_greedy_behind_the_prompt(name, fed):
    """Against the whole input read again for every token."""
    model, _ = loaded(name)
    calls, prompt = fed(model), rows_for(model, 3)
    latency(model, 9, 4, prompt, warmup=0, repeats=1)
    wrote = [int(call[3]) for call in calls[1:]]
    row, expected = tokens(258, 1, 9), []
    for _ in range(4):
        with torch.no_grad():
            logits = model(inputs_embeds=with_prompt(model, row, prompt)).logits
        expected.append(int(logits[0, -1].argmax()))
        row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
    assert wrote == expected


def test_tokens_are_the_same_every_time_and_valid(fed):
    model = tiny_llama(context=128)
    calls = fed(model)
    before = torch.get_rng_state()
    latency(model, 100, 1, warmup=1, repeats=2)
    assert torch.equal(torch.get_rng_state(), before)
    read = [call[3] for call in calls if call[0] == (1, 100)]
    assert len(read) == 3
    assert all(torch.equal(ids, read[0]) for ids in read)
    assert int(read[0].max()) < 61
    assert len(read[0].unique()) > 30
    assert tokens(61, 1, 5).tolist() == [[30, 25, 31, 0, 57]]  # of another day too


def test_every_number_is_that_of_the_list(monkeypatch):
    """With a clock that says how long each part took: 1, 3, 2, 10 s to read, 5 s for the five steps of decoding."""
    times, now = iter([1, 3, 2, 10]), [0.0]
    model = tiny_llama()

    def clock():
        step = len(ticks) % 4
        now[0] += {0: 0.0, 1: next(times) if step == 1 else 0.0, 2: 100.0, 3: 5.0}[step]
        ticks.append(now[0])
        return now[0]

    ticks = []
    monkeypatch.setattr(module.time, "perf_counter", clock)
    result = latency(model, 8, 5, warmup=0, repeats=4)
    assert result.prefill == (1.0, 3.0, 2.0, 10.0)
    assert result.decode == (1.0, 1.0, 1.0, 1.0)  # what lies between the two parts is in neither
    numbers = result.metrics()
    assert numbers["prefill_seconds"] == 2.5
    assert numbers["prefill_seconds_iqr"] == 4.75 - 1.75  # linear between the sorted values, as numpy's percentiles
    assert (numbers["prefill_seconds_min"], numbers["prefill_seconds_max"]) == (1.0, 10.0)
    assert numbers["decode_seconds_per_token_iqr"] == 0.0


def test_warmup_rounds_are_not_in_the_list(monkeypatch):
    rounds = iter(range(5))
    monkeypatch.setattr(module, "_round", lambda *args: (float(next(rounds)), 1.0, 9, 9))
    done = []
    result = latency(tiny_llama(), 8, 1, warmup=2, repeats=3, progress=lambda *at: done.append(at))
    assert result.prefill == (2.0, 3.0, 4.0)
    assert done == [(i, 5) for i in range(1, 6)]


def test_one_round_has_no_spread():
    assert "prefill_seconds_iqr" not in latency(tiny_llama(), 8, 1, warmup=0, repeats=1).metrics()


def test_longer_inputs_take_longer_and_more_memory():
    model, _ = loaded("tiny-opt-3")
    short, long = (latency(model, n, 2, batch=4, warmup=1, repeats=3) for n in (16, 2000))
    assert min(long.prefill) > 3 * min(short.prefill)  # 125 times as many tokens; the least is the least disturbed
    assert long.cache_bytes == short.cache_bytes * 2002 // 18
    assert long.memory_peak_bytes >= short.memory_peak_bytes
    assert short.memory_peak_bytes > 50e6  # Python and torch alone


def test_memory_is_that_since_the_rounds_began():
    model = tiny_llama()
    big = torch.ones(2**27)  # 512 MiB that are gone when the rounds begin
    del big
    result = latency(model, 8, 1, warmup=0, repeats=1)
    if "while timing" not in result.memory_measured:
        pytest.skip("the system does not let a process reset its peak")
    again = torch.ones(2**27)
    held = latency(model, 8, 1, warmup=0, repeats=1)
    # The allocator gives so large a block back at once; what else a process holds moves by some MiB.
    assert held.memory_peak_bytes - result.memory_peak_bytes == pytest.approx(again.numel() * 4, rel=0.1)


def test_measure_writes_every_timing_and_the_machine(tmp_path):
    model, tokenizer = loaded("tiny-opt-1")
    job = job_for(tmp_path, model, tokenizer, rows_for(model, 6))
    spec = Latency(seq_len=20, new_tokens=3, warmup=1, repeats=5)
    numbers = measure._latency(spec, job)
    stored = read_json(tmp_path / "latency.json")
    assert len(stored["prefill"]) == len(stored["decode"]) == 5
    assert min(stored["prefill"] + stored["decode"]) > 0
    assert numbers["prefill_seconds"] == statistics.median(stored["prefill"])
    assert numbers["decode_seconds_per_token"] == statistics.median(stored["decode"])
    assert numbers["prompt_tokens"] == stored["prompt_tokens"] == 6
    assert stored["settings"] == spec.model_dump()
    about = job.record["machine_detail"]
    assert stored["machine"] == about
    assert (about["device"], about["dtype"], about["attention"]) == ("cpu", "float32", "sdpa")
    assert (about["torch"], about["threads"]) == (torch.__version__, torch.get_num_threads())
    assert about["ram_bytes"] > 2**28
    assert about["cpu"]
    assert len(about["gpus"]) == torch.cuda.device_count()
    assert all(isinstance(v, int | float) for v in numbers.values())
    assert record.process_peak() > 0


def test_the_model_is_left_as_it_was():
    model = tiny_llama().train()
    latency(model, 8, 1, warmup=0, repeats=1)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": 60}, r"^2 prompt rows \+ 60 tokens \+ 3 new ones = 65 exceed the model's context of 64$"),
        ({"repeats": 0}, r"^repeats = 0, allowed: 1 and more$"),
        ({"warmup": -1}, r"^warmup = -1, allowed: 0 and more$"),
        ({"batch": 0}, r"^batch = 0, allowed"),
        ({"prompt": torch.ones(2, 9)}, r"^prompt of shape \(2, 9\): must be \(k, 32\)"),
    ],
)
def test_what_is_not_allowed(fields, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        latency(model, **{"seq_len": 8, "new_tokens": 3, "prompt": rows_for(model, 2), **fields})


def test_a_model_without_a_cache_says_so(monkeypatch):
    model = tiny_llama()
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: plain(input_ids=input_ids, use_cache=False))
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM keeps no cache"):
        latency(model, 8, 1, warmup=0, repeats=1)
