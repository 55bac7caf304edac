"""A hard prompt is a text really in front: one beginning of text and no end of text between, for every tokenizer."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from support.harness import CLOSE, asked, bare, framed, untied
from support.tiny import tiny_llama, tiny_opt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctp.cells import HardPrompt, Perplexity
from ctp.cells.inputs import Windows
from ctp.cells.runtime import Runtime
from ctp.data.specials import plain_ids
from ctp.evaluation.generation import answer_tokens
from ctp.evaluation.harness import SoftPromptLM
from ctp.execution.jobs import EvaluateJob
from ctp.execution.measure import _perplexity
from ctp.models.tiny import BOS
from ctp.prompts.prefix import prefix
from ctp.prompts.rows import untrained_rows

TEXT = "Mind the gap."
FRAMES = [(True, True), (True, False), (False, True), (False, False)]
frames = pytest.mark.parametrize(("before", "after"), FRAMES, ids=["both", "bos", "eos", "none"])


@pytest.fixture(scope="module")
def model():
    return untied(tiny_llama(vocab=260, context=96))


def rows_of(model, tokenizer, text=TEXT):
    return untrained_rows(HardPrompt(text=text), model, tokenizer)


def nll(model, ids, scored):
    """Of the last `scored` tokens, one plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logp = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids)[1:, None])
    return -logp[len(ids) - 1 - scored :].sum().item()


@frames
@pytest.mark.parametrize("bos", ["first", "each", "none"])
@pytest.mark.parametrize("text", [TEXT, "x"])
def test_windows_stand_behind_it_as_one_text(model, monkeypatch, before, after, bos, text):
    tokenizer = framed(before, after)
    words = "abcdefghijklmnopqrstuvwxyz"
    spec = Windows(dataset="d", split="test", seq_len=6, join="", revision="r", bos=bos)
    from ctp.data.windows import cut_windows

    ids = cut_windows(spec, [words], tokenizer)
    rows = rows_of(model, tokenizer, text)
    cell = SimpleNamespace(recovery=SimpleNamespace(recovery=HardPrompt(text=text)))
    monkeypatch.setattr(EvaluateJob, "windows", lambda job, text: ids)
    monkeypatch.setattr(EvaluateJob, "prefix", property(lambda job: prefix(job.model, job.prompt)))
    seen = []
    job = EvaluateJob(
        store=None, runtime=Runtime(batch=3), device="cpu", folder=None, record={}, report=seen.append, reads=None,
        cell=cell, model=model, tokenizer=tokenizer, prompt=rows,
    )  # fmt: skip
    with torch.no_grad():
        found = _perplexity(Perplexity(text=spec), job)
    prompt = plain_ids(tokenizer, text)
    total = positions = 0
    for window in ids.tolist():
        begins = window[0] == BOS
        front = [BOS] * (before or begins) + prompt
        total += nll(model, front + window[begins:], 5)
        positions += len(front) + len(window[begins:]) - 1
    assert found["nll_sum"] == pytest.approx(total, rel=1e-5)
    assert (found["scored_tokens"], found["positions"]) == (5 * len(ids), positions)
    assert seen[-1].numbers() == {"step": len(ids), "steps": len(ids)}


@frames
def test_tasks_stand_behind_it_as_one_text(model, before, after):
    tokenizer = framed(before, after)
    pairs = [("Where?", " Here"), ("", "There"), ("x" * 99, " cut"), ("Why is it so?", " No")]
    for batch in (1, 4):
        lm = SoftPromptLM(model, tokenizer, rows_of(model, tokenizer), batch=batch, text=TEXT)
        found = lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
        front = [BOS] * before + plain_ids(tokenizer, TEXT)
        for (context, answer), (ll, _) in zip(pairs, found, strict=True):
            ids = plain_ids(tokenizer, context + answer)
            room = lm.max_length + 1
            ids = ids if len(ids) < room else ids[-room:]
            assert ll == pytest.approx(-nll(model, front + ids, len(plain_ids(tokenizer, answer))), **CLOSE)


@frames
def test_generated_answers_stand_behind_it_as_one_text(model, before, after):
    tokenizer = framed(before, after)
    model.generation_config.eos_token_id = None
    until = {"until": ["\n\n\n"], "max_gen_toks": 5, "do_sample": False}
    contexts = ["A long beginning", "Hm", "y" * 90, ""]
    front = [BOS] * before + plain_ids(tokenizer, TEXT)
    for batch in (1, 4):
        lm = SoftPromptLM(model, tokenizer, rows_of(model, tokenizer), batch=batch, text=TEXT)
        found = lm.generate_until(asked("generate_until", [(c, until) for c in contexts]), disable_tqdm=True)
        for context, text in zip(contexts, found, strict=True):
            rest = plain_ids(tokenizer, context)[-(lm.max_length - 5 - bool(after)) :]
            out = front + rest
            for _ in range(5):
                with torch.no_grad():
                    out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
            made = tokenizer.decode(out[len(front) + len(rest) :], skip_special_tokens=True)
            assert text == made.split("<eos>")[0]


@frames
def test_a_question_behind_it_is_one_text(model, before, after):
    tokenizer = framed(before, after)
    found = answer_tokens(model, tokenizer, ["Why?"], rows_of(model, tokenizer), 6, before=TEXT)
    plain = framed(before, False)
    assert found == answer_tokens(model, plain, [f"{TEXT} Why?"], None, 6)


# ----------------------------------------------------------- what the harness cannot do


def merging():
    """Bytes, and "ro" + "mp" = "romp"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*letters, "<eos>", "ro", "mp", "romp"])}
    backend = Tokenizer(models.BPE(vocab, [("r", "o"), ("m", "p"), ("ro", "mp")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.mark.parametrize("prompt", [None, 3])
def test_an_answer_that_makes_one_token_with_its_context_is_encoded_by_itself(model, prompt):
    tokenizer = merging()
    ro, mp = (tokenizer.convert_tokens_to_ids(t) for t in ("ro", "mp"))
    rows = None if prompt is None else model.get_input_embeddings().weight[[5, 6, 7]].detach()
    front = [] if prompt is None else [5, 6, 7]
    pairs = [("ro", "mp"), ("ro ", "mp"), ("a ro", "mp"), ("ro", "d"), (" ", "x")]
    lm = SoftPromptLM(model, tokenizer, rows, batch=2)
    found = [ll for ll, _ in lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)]
    a, d, blank, x = (plain_ids(tokenizer, t) for t in ("a ", "d", " ", "x"))
    by_hand = [
        ([ro], [mp]), ([ro], [*blank, mp]), ([*a, ro], [mp]), ([ro], d), ([tokenizer.eos_token_id], [*blank, *x]),
    ]  # fmt: skip
    assert found == pytest.approx([-nll(model, front + c + t, len(t)) for c, t in by_hand], **CLOSE)
    with pytest.raises(ValueError, match="an answer to 'ro' is empty"):
        lm.loglikelihood(asked("loglikelihood", [("ro", "")]), disable_tqdm=True)


def test_sentencepieces_space_is_no_part_of_such_an_answer(model):
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "\n", "ro", "mp", "romp", "▁romp", "▁ro", "▁mp", "</s>"]
    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate(letters)}, [
            ("r", "o"), ("m", "p"), ("ro", "mp"), ("▁", "romp"), ("▁", "ro"), ("▁", "mp"),
        ])
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    lm = SoftPromptLM(model, tokenizer)
    front, answer = lm._encode_pair("ro", "mp")
    assert tokenizer.convert_ids_to_tokens(front) == ["▁ro"]
    assert tokenizer.convert_ids_to_tokens(answer) == ["mp"]


@pytest.mark.parametrize("special", [{"bos_token": "<bos>"}, {"eos_token": "<eos>"}], ids=["bos alone", "eos alone"])
def test_one_special_token_is_enough(model, special):
    tokenizer = bare(**special)
    lm = SoftPromptLM(model, tokenizer, batch=2)
    until = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    assert len(lm.loglikelihood(asked("loglikelihood", [("a", "b"), ("", "c"), ("abc", "de")]), disable_tqdm=True)) == 3
    texts = lm.generate_until(asked("generate_until", [(c, until) for c in ("a", "", "abc")]), disable_tqdm=True)
    assert all(isinstance(t, str) for t in texts)
    assert tokenizer.pad_token is None  # the caller's is as it was


def test_none_is_too_few(model):
    with pytest.raises(ValueError, match="neither a beginning-of-text nor an end-of-text token"):
        SoftPromptLM(model, bare())


def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_request():
    model = untied(tiny_opt(vocab=260))
    pairs = asked("loglikelihood", [("Where?", " Here"), ("", "There")])
    plain = HFLM(pretrained=model, tokenizer=framed(True, False), batch_size=1).loglikelihood(pairs, disable_tqdm=True)
    assert SoftPromptLM(model, framed(True, True)).loglikelihood(pairs, disable_tqdm=True) == plain
