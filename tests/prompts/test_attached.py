"""A prompt attached to a model: calls and generation, against ctp's own forward pass and loops written by hand."""

import copy
import math

import pytest
import torch
from support.tiny import random_windows, tiny_bloom, tiny_llama, tiny_opt
from support.tinygrid import VOCAB, byte_tokenizer
from transformers import DynamicCache, StaticCache

from ctp.evaluation.perplexity import perplexity
from ctp.prompts.attach import scored_logits
from ctp.prompts.attached import attach_prompt
from ctp.prompts.prefix import with_prompt

MODELS = {
    "llama": tiny_llama,
    "opt": tiny_opt,
    "opt_projected": lambda **fields: tiny_opt(embed=16, **fields),
    "bloom": tiny_bloom,
}
TEXTS = ["A", "Once upon a", "a time"]
K, NEW = 5, 12


@pytest.fixture(params=MODELS)
def model(request):
    """With a head of its own: a tied one makes a random model say its last token again, whatever it has read."""
    made = MODELS[request.param](vocab=VOCAB)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(torch.randn_like(made.lm_head.weight))
    made.generation_config.eos_token_id = None  # random models would stop rows where they like
    made.generation_config.pad_token_id = VOCAB - 1
    return made


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.pad_token, made.padding_side = "<eos>", "left"
    return made


def some_prompt(model, k=K, seed=1):
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed))


def rows_of(tokenizer):
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]


def greedy(model, row, prompt, new=NEW):
    """The whole input through the model again for every token, no cache and no padding."""
    out = row
    for _ in range(new):
        with torch.no_grad():
            logits = model(inputs_embeds=with_prompt(model, out[None], prompt)).logits
        out = torch.cat([out, logits[0, -1].argmax()[None]])
    return out[len(row) :]


def alike(ours, theirs):
    """fp32 on both sides, other orders of summation: some twenty products, one after the other, of sums of 32 or 64
    terms, each rounded by 2^-24 of the largest. 20 * 8 * 2^-24 = 1e-5; 5e-7 was seen.
    """
    return float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("fields", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
def test_a_padded_batch_generates_what_each_row_does_alone(model, tokenizer, fields):
    prompt, rows = some_prompt(model), rows_of(tokenizer)
    by_hand = torch.stack([greedy(model, row, prompt) for row in rows])
    plain = torch.stack([greedy(model, row, prompt[:0]) for row in rows])
    attach_prompt(model, prompt)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    options = {"max_new_tokens": NEW, "do_sample": False, **fields}
    found = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    alone = [model.generate(row[None], **options)[0, len(row) :] for row in rows]
    assert torch.equal(found[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert torch.equal(found[:, batch["input_ids"].shape[1] :], by_hand)
    assert torch.equal(torch.stack(alone), by_hand)
    assert not torch.equal(by_hand, plain)  # the prompt is read


def test_the_padding_is_found_without_a_mask(model, tokenizer):
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    attach_prompt(model, some_prompt(model))
    given = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=NEW)
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=NEW), given)


@pytest.mark.parametrize("fields", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_are_those_of_each_row_alone(model, tokenizer, fields):
    attach_prompt(model, some_prompt(model))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **fields)
    again = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, use_cache=False, **fields)
    alone = [model.generate(r[None], max_new_tokens=NEW, **fields)[:, len(r) :] for r in rows_of(tokenizer)]
    assert torch.equal(found, again)
    assert torch.equal(found[:, ids.shape[1] :], torch.cat(alone))


def test_samples_are_drawn_from_the_logits_behind_the_prompt(model, tokenizer):
    row, prompt = rows_of(tokenizer)[1], some_prompt(model)
    attach_prompt(model, prompt)
    fields = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    found = model.generate(row[None], do_sample=True, top_k=0, **fields)
    torch.manual_seed(0)
    again = model.generate(row[None], do_sample=True, top_k=0, use_cache=False, **fields)
    model._attached_prompt.remove()
    assert torch.equal(found.sequences, again.sequences)
    with torch.no_grad():
        expected = scored_logits(model, found.sequences, prompt)[0, -NEW:]
        plain = scored_logits(model, found.sequences)[0, -NEW:]
    for logits in (found.logits, again.logits):
        assert alike(torch.cat(logits), expected)
        assert not torch.allclose(torch.cat(logits), plain, atol=0.01)


# --------------------------------------------------------------------------- calls


def test_logits_are_those_of_ctp(model, tokenizer):
    prompt, rows = some_prompt(model), rows_of(tokenizer)
    with torch.no_grad():
        ours = [scored_logits(model, row[None], prompt)[0] for row in rows[1:]]
        attach_prompt(model, prompt)
        batch = tokenizer(TEXTS[1:], padding=True, return_tensors="pt")
        padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for i, row in enumerate(rows[1:]):
            logits = model(row[None]).logits  # positional, as torch allows
            assert logits.shape == (1, len(row), VOCAB)
            assert alike(logits[0, :-1], ours[i])
            assert alike(padded[i, -len(row) : -1], ours[i])
            assert alike(model(row[None], logits_to_keep=2).logits, logits[:, -2:])
            assert alike(model(row[None], logits_to_keep=99).logits, logits)


def test_positions_may_be_given(model, tokenizer):
    attach_prompt(model, some_prompt(model))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
        given = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(own[mask.bool()], given[mask.bool()])


def test_the_loss_is_the_perplexity_of_ctp(model):
    windows, prompt = random_windows(4, 24, vocab=VOCAB), some_prompt(model)
    expected = perplexity(model, windows, prompt)
    attach_prompt(model, prompt)
    with torch.no_grad():
        loss = model(input_ids=windows, attention_mask=torch.ones_like(windows), labels=windows).loss.item()
        bare = model(input_ids=windows, labels=windows).loss.item()
    assert math.exp(loss) == pytest.approx(expected.ppl, rel=1e-5)  # theirs is an fp32 mean
    assert bare == loss


def test_the_loss_of_a_padded_batch_is_that_of_its_rows(model, tokenizer):
    batch, prompt = tokenizer(TEXTS, padding=True, return_tensors="pt"), some_prompt(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    results = [perplexity(model, row[None], prompt) for row in rows_of(tokenizer)[1:]]
    labels = ids.masked_fill(mask == 0, -100)
    attach_prompt(model, prompt)
    with torch.no_grad():
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    # The first text is one token, which nothing scores.
    assert loss == pytest.approx(sum(r.nll_sum for r in results) / sum(r.scored_tokens for r in results), rel=1e-5)
    assert labels[0, -1] == ids[0, -1]  # the caller's labels are not written to


def test_a_cache_can_be_filled_by_hand(model):
    windows = random_windows(2, 10, vocab=VOCAB)
    attach_prompt(model, some_prompt(model))
    with torch.no_grad():
        whole = model(windows).logits
        begun = model(windows[:, :6], use_cache=True)
        assert begun.past_key_values.get_seq_length() == K + 6
        branch = copy.deepcopy(begun.past_key_values)
        rest = model(windows[:, 6:], past_key_values=begun.past_key_values).logits
        mask = torch.ones_like(windows)
        masked = model(windows[:, 6:], attention_mask=mask, past_key_values=branch, return_dict=False)[0]
    assert alike(rest, whole[:, 6:])
    assert alike(masked, whole[:, 6:])


def test_a_prompt_learns_through_the_attached_model(model):
    """The gradient reaches the rows, also in a padded batch."""
    prompt = some_prompt(model).requires_grad_()
    attach_prompt(model, prompt)
    ids, mask = random_windows(2, 6, vocab=VOCAB), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert (prompt.grad.abs().sum(1) > 0).all()


# ---------------------------------------------------------------- on and off again


def test_removed_it_leaves_the_model_as_it_was(model, tmp_path):
    windows = random_windows(2, 10, vocab=VOCAB)
    attributes, config, state = set(vars(model)), model.config.to_dict(), list(model.state_dict())
    before = model(windows).logits
    handle = attach_prompt(model, some_prompt(model))
    assert not torch.equal(model(windows).logits, before)
    assert (model.config.to_dict(), list(model.state_dict())) == (config, state)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(windows).logits, before)
    handle.remove()
    handle.remove()
    assert torch.equal(model(windows).logits, before)
    assert set(vars(model)) == attributes
    assert type(model).forward is model.forward.__func__


def test_a_copy_keeps_its_own_prompt(model):
    windows = random_windows(2, 10, vocab=VOCAB)
    before = model(windows).logits
    handle = attach_prompt(model, some_prompt(model))
    prompted = model(windows).logits
    other = copy.deepcopy(model)
    handle.remove()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert torch.equal(other(windows).logits, prompted)
    other._attached_prompt.remove()
    assert torch.equal(other(windows).logits, before)


def test_a_caller_of_forward_itself_gets_the_prompt(model):
    """As PEFT's LoraModel does."""
    windows = random_windows(2, 10, vocab=VOCAB)
    attach_prompt(model, some_prompt(model))
    assert torch.equal(model.forward(windows).logits, model(windows).logits)


# ------------------------------------------------------------------- what cannot work


def filled(model, k=K):
    """A cache of six tokens behind another prompt, or none."""
    handle = attach_prompt(model, some_prompt(model, k)) if k else None
    cache = model(random_windows(1, 6), use_cache=True).past_key_values
    if handle:
        handle.remove()
    return cache


@pytest.mark.parametrize("k", [0, K])
def test_a_cache_without_this_prompt_is_refused(model, k):
    cache = filled(model, k)
    attach_prompt(model, some_prompt(model))
    with pytest.raises(ValueError, match="filled without this soft prompt"):
        model(random_windows(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m, ids: {"inputs_embeds": m.get_input_embeddings()(ids)}, "no inputs_embeds"),
        (lambda m, ids: {"input_ids": ids, "attention_mask": torch.ones(1, 1, 6, 6)}, r"must be \(1, 6\)"),
        (lambda m, ids: {"input_ids": ids, "attention_mask": torch.ones(1, 6 + K)}, r"must be \(1, 6\)"),
        (lambda m, ids: {"input_ids": ids[:, :0]}, "tokens > 0"),
        (lambda m, ids: {"input_ids": ids, "logits_to_keep": torch.tensor([0])}, "must be a number"),
        (
            lambda m, ids: {"input_ids": ids, "past_key_values": StaticCache(config=m.config, max_cache_len=32)},
            "a StaticCache does not work",
        ),
    ],
)
def test_calls_that_cannot_work(model, arguments, message):
    attach_prompt(model, some_prompt(model))
    with pytest.raises(ValueError, match=message):
        model(**arguments(model, random_windows(1, 6)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_implementation": "static"}, "allowed: 'dynamic'"),
        ({"cache_implementation": "paged"}, "paged cache"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation does not work"),
        ({"assistant_model": tiny_llama(vocab=VOCAB)}, "assisted_generation does not work"),
        ({"inputs_embeds": torch.zeros(1, 6, 32)}, "no inputs_embeds"),
    ],
    ids=["static", "paged", "lookup", "assistant", "embeds"],
)
def test_generation_that_cannot_work(fields, message):
    model = tiny_llama(vocab=VOCAB)
    attach_prompt(model, some_prompt(model))
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": random_windows(1, 6), "max_new_tokens": 4, **fields})


def test_generation_does_not_go_on_from_a_cache(model):
    attach_prompt(model, some_prompt(model))
    ids, cache = random_windows(1, 6), DynamicCache(config=model.config)
    model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot go on from a filled cache"):
        model.generate(random_windows(1, 12), past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_the_context_holds_prompt_input_and_new_tokens(make):
    model = make()
    model.generation_config.eos_token_id = None
    attach_prompt(model, some_prompt(model))
    ids = random_windows(1, 10)
    assert model.generate(ids, max_new_tokens=64 - 10 - K).shape == (1, 64 - K)
    with pytest.raises(ValueError, match=r"5 prompt rows \+ input and new tokens \(60\) = 65 exceed .* context of 64"):
        model.generate(ids, max_new_tokens=64 - 10 - K + 1)
    with pytest.raises(ValueError, match=r"5 prompt rows \+ 60 tokens = 65 exceed .* context of 64"):
        model(random_windows(1, 60))


def test_a_prompt_that_does_not_fit_is_refused(model):
    width = model.get_input_embeddings().embedding_dim
    for wrong in (torch.zeros(3, width + 1), torch.zeros(width), torch.zeros(0, width)):
        with pytest.raises(ValueError, match=rf"must be \(k, {width}\)"):
            attach_prompt(model, wrong)
    attach_prompt(model, some_prompt(model))
    with pytest.raises(ValueError, match="has a prompt already"):
        attach_prompt(model, some_prompt(model))
    with pytest.raises(ValueError, match="not to a Linear"):
        attach_prompt(torch.nn.Linear(2, 2), torch.zeros(1, 2))
