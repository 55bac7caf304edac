"""Tasks of lm-evaluation-harness behind a soft prompt: against the harness itself, and against sums written by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from support.harness import CLOSE, asked, untied
from support.tiny import tiny_bloom, tiny_llama, tiny_opt
from support.tinygrid import VOCAB, byte_tokenizer
from support.tinytasks import DATA, SHIPPED, needs_data, own_task

from ctp.cells import Task
from ctp.cells.runtime import Runtime
from ctp.data import taskfiles, tasks
from ctp.evaluation.harness import SoftPromptLM
from ctp.evaluation.tasks import build
from ctp.execution.jobs import EvaluateJob
from ctp.execution.measure import _task
from ctp.prompts.prefix import with_prompt

MODELS = {
    "llama": lambda **fields: tiny_llama(VOCAB, **fields),
    "opt": lambda **fields: tiny_opt(VOCAB, **fields),
    "opt_projected": lambda **fields: tiny_opt(VOCAB, embed=16, **fields),
    "bloom": lambda context=None: tiny_bloom(VOCAB),
}
PAIRS = [("Once upon a time", " there was"), ("A", " b"), ("", "No context"), ("The cat sat on", " the mat, and slept")]
TEXTS = ["Once upon a time there was a cat. " * 8, "Short."]


@pytest.fixture(params=MODELS)
def model(request):
    """With a head of its own: a tied one makes a random model say its last token again, whatever it has read."""
    return untied(MODELS[request.param](context=128))


def prompt_for(model, k=5, seed=1):
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed))


def answers(lm):
    """What a model says to requests of all three kinds."""
    until = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    return {
        "loglikelihood": lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True),
        "rolling": lm.loglikelihood_rolling(asked("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True),
        "texts": lm.generate_until(asked("generate_until", [(c or "x", until) for c, _ in PAIRS]), disable_tqdm=True),
    }


def score(model, prompt, context, answer):
    """Log-likelihood of tokens `answer` behind prompt and `context`, one forward pass, float64 log-softmax."""
    ids = torch.tensor([context + answer])
    with torch.no_grad():
        logits = model(inputs_embeds=with_prompt(model, ids[:, :-1], prompt)).logits[0].double()
    rows = torch.log_softmax(logits[len(prompt) + len(context) - 1 :], -1)
    return rows.gather(1, ids[0, len(context) :, None]).sum().item()


# --------------------------------------------------------------------- the model


@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_prompt_it_is_the_harness_to_the_last_digit(model, batch):
    plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=batch)
    assert answers(SoftPromptLM(model, byte_tokenizer(), batch=batch)) == answers(plain)


def test_with_a_prompt_a_batch_gives_what_each_request_gives_by_hand(model):
    prompt, tokenizer = prompt_for(model), byte_tokenizer()
    eos, ids = tokenizer.eos_token_id, lambda text: tokenizer(text)["input_ids"]
    by_hand = [score(model, prompt, ids(c) or [eos], ids(a)) for c, a in PAIRS]
    without = [score(model, prompt[:0], ids(c) or [eos], ids(a)) for c, a in PAIRS]
    alone, batched = (answers(SoftPromptLM(model, tokenizer, prompt, batch=b)) for b in (1, 3))
    for found in (alone, batched):
        assert [ll for ll, _ in found["loglikelihood"]] == pytest.approx(by_hand, **CLOSE)
    assert [g for _, g in alone["loglikelihood"]] == [g for _, g in batched["loglikelihood"]]
    assert alone["texts"] == batched["texts"]
    assert alone["rolling"] == pytest.approx(batched["rolling"], abs=1e-2, rel=1e-5)  # 270 tokens each
    assert by_hand != pytest.approx(without, abs=0.1)


def test_rolling_windows_leave_room_for_the_prompt(model):
    prompt, tokenizer = prompt_for(model, k=28), byte_tokenizer()
    lm = SoftPromptLM(model, tokenizer, prompt, batch=2)
    ids, eos = tokenizer(TEXTS[0])["input_ids"], [tokenizer.eos_token_id]
    room = min(lm.max_length, len(ids))  # 100; BLOOM, without a limit, reads it whole
    by_hand = score(model, prompt, eos, ids[:room])
    for start in range(room, len(ids), room):  # every later window is full: it begins with tokens scored before
        end = min(start + room, len(ids))
        by_hand += score(model, prompt, ids[end - room - 1 : start], ids[start:end])
    assert answers(lm)["rolling"][0] == pytest.approx(by_hand, abs=1e-2, rel=1e-5)


def test_rows_of_the_embedding_do_what_their_tokens_do(model):
    """A hard prompt as embeddings, against the same tokens in front of every context. In BLOOM the embeddings pass a
    norm after the lookup, in OPT-350M a projection: both come after the prompt is put in front."""
    ids = byte_tokenizer()("Answer well: ")["input_ids"]
    rows = model.get_input_embeddings()(torch.tensor(ids)).detach()
    requests = [(("", ""), [9, 8, 7], [3, 4]), (("", ""), [5], [6]), (("", ""), [1, 2], [3, 4, 5, 6])]
    plain = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2)
    as_tokens = plain._loglikelihood_tokens([(n, ids + c, a) for n, c, a in requests], disable_tqdm=True)
    soft = SoftPromptLM(model, byte_tokenizer(), rows, batch=2)
    as_rows = soft._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [x for x, _ in as_rows] == pytest.approx([x for x, _ in as_tokens], **CLOSE)


def test_generation_behind_a_prompt_equals_a_loop_by_hand(model):
    prompt, tokenizer = prompt_for(model), byte_tokenizer()
    until = {"until": [], "max_gen_toks": 6, "do_sample": False}
    contexts = ["A long beginning", "Hm", "xyz"]
    model.generation_config.eos_token_id = None
    lm = SoftPromptLM(model, tokenizer, prompt, batch=3)
    found = lm.generate_until(asked("generate_until", [(c, until) for c in contexts]), disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        out = tokenizer(context)["input_ids"]
        start = len(out)
        for _ in range(6):
            with torch.no_grad():
                out.append(
                    int(model(inputs_embeds=with_prompt(model, torch.tensor([out]), prompt)).logits[0, -1].argmax())
                )
        eos = tokenizer.eos_token  # the harness ends a text there
        assert text == tokenizer.decode(out[start:], skip_special_tokens=True).split(eos)[0]


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_does_not_fit_behind_the_prompt_loses_its_beginning(architecture):
    model, tokenizer = untied(MODELS[architecture](context=48)), byte_tokenizer()
    prompt = prompt_for(model, k=20)
    lm = SoftPromptLM(model, tokenizer, prompt, batch=2)
    assert lm.max_length == 28
    pairs = [("c" * 10 + "It was a very long story", " indeed"), ("fits", " well")]
    found = lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    context, answer = (tokenizer(t)["input_ids"] for t in pairs[0])
    assert found[0][0] == pytest.approx(score(model, prompt, context[-(29 - len(answer)) :], answer), **CLOSE)
    assert lm.cut == 1
    until = {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False}
    assert isinstance(lm.generate_until(asked("generate_until", [("c" * 99, until)]), disable_tqdm=True)[0], str)
    with pytest.raises(ValueError, match="47 prompt rows leave no room in a context of 48 tokens"):
        SoftPromptLM(model, tokenizer, prompt_for(model, k=47))


# --------------------------------------------------------------- whole measures


def job_for(tmp_path, name, model=None, prompt=None, batch=4, seen=None, data=None, **fields):
    """(spec, job) of a task, pinned as a grid pins it."""
    short, revision, location = tasks.locate(name, data, SHIPPED)
    spec = Task(name=short, revision=revision, **fields)
    folder = tmp_path / f"job{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    runtime = Runtime(device="cpu", batch=batch, locations={spec.pinned_name: location})
    model = model or untied(tiny_llama(VOCAB, context=4096))
    report = (lambda numbers: None) if seen is None else seen.append
    cell = SimpleNamespace(recovery=None)
    return spec, EvaluateJob(
        store=None, runtime=runtime, device="cpu", folder=folder, record={}, report=report, reads=None, cell=cell,
        model=model, tokenizer=byte_tokenizer(), prompt=prompt,
    )  # fmt: skip


def run(*args, **fields):
    spec, job = job_for(*args, **fields)
    return _task(spec, job), job


def samples(job):
    return [json.loads(line) for line in (job.folder / "samples.jsonl").read_text().splitlines()]


def test_openbookqa_counted_by_hand(tmp_path):
    model = untied(tiny_llama(VOCAB, context=1024))
    prompt, ids = prompt_for(model), lambda text: byte_tokenizer()(text)["input_ids"]
    seen = []
    metrics, job = run(tmp_path, "ctp_openbookqa.yaml", model, prompt, limit=6, seen=seen)
    right, normed = [], []
    for line, sample in zip((SHIPPED / "openbookqa.jsonl").read_text().splitlines(), samples(job), strict=False):
        row = json.loads(line)
        choices, gold = row["choices"]["text"], "ABCD".index(row["answerKey"])
        lls = [score(model, prompt, ids(row["question_stem"]), ids(f" {c}")) for c in choices]
        assert [ll for ll, _ in sample["responses"]] == pytest.approx(lls, abs=0.01, rel=1e-5)  # 60 tokens an answer
        right.append(max(range(4), key=lls.__getitem__) == gold)
        normed.append(max(range(4), key=lambda i: lls[i] / len(choices[i])) == gold)
        assert (sample["acc"], sample["acc_norm"]) == (right[-1], normed[-1])
    p = sum(normed) / 6
    assert metrics["score"] == metrics["acc_norm"] == pytest.approx(p)
    assert metrics["acc"] == pytest.approx(sum(right) / 6)
    assert metrics["score_stderr"] == pytest.approx((p * (1 - p) / 5) ** 0.5)  # of a mean of 6
    assert metrics["documents"] == len(samples(job)) == 6
    about = {"name": "ctp_openbookqa", "metric": "acc_norm", "version": 1.0, "documents": 6, "shots": 0, "cut": 0}
    assert job.record["task"] == {**about, "harness": taskfiles.harness_version()}
    assert seen[-1].numbers() == {"step": 24, "steps": 24}  # four answers to each of six questions


@needs_data
@pytest.mark.parametrize(
    ("own", "harness"),
    [
        ("openbookqa", "openbookqa"),
        ("hellaswag", "hellaswag"),
        ("piqa", "piqa"),
        ("european_history", "mmlu_high_school_european_history"),
    ],
)
def test_the_shipped_tasks_are_the_harness_on_their_rows(tmp_path, own, harness):
    model = untied(tiny_llama(VOCAB, context=512))
    prompt = prompt_for(model)
    limit = 5 if own == "european_history" else 10
    ours, our_job = run(tmp_path, f"ctp_{own}.yaml", model, prompt, limit=limit)
    theirs, their_job = run(tmp_path, harness, model, prompt, limit=limit, data=DATA)
    assert ours == theirs
    assert [s["responses"] for s in samples(our_job)] == [s["responses"] for s in samples(their_job)]
    assert [s["prompt_hash"] for s in samples(our_job)] == [s["prompt_hash"] for s in samples(their_job)]
    assert our_job.record["task"]["cut"] == (4 * limit if own == "european_history" else 0)
    asked_ours, asked_theirs = (build(tasks.locate(n, DATA, SHIPPED)[2], *rest) for n, *rest in (
        (f"ctp_{own}.yaml", tasks.locate(f"ctp_{own}.yaml", DATA, SHIPPED)[1], 0),
        (harness, tasks.locate(harness, DATA)[1], 0),
    ))  # fmt: skip
    rows = 20 if own == "european_history" else 40
    for task in (asked_ours, asked_theirs):
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=rows)
    assert [i.args for i in asked_ours.instances] == [i.args for i in asked_theirs.instances]  # of every row


def test_measuring_again_gives_the_same_and_changes_nothing(tmp_path):
    model = untied(tiny_llama(VOCAB, context=8192)).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    parameters, attributes = dict(model.named_parameters()), set(vars(model))
    python_state = torch.get_rng_state()
    found = []
    for prompt, shots in [(None, 0), (prompt_for(model), 2), (None, 0), (prompt_for(model), 2)]:
        spec, job = job_for(tmp_path, "ctp_european_history.yaml", model, prompt, limit=2, shots=shots)
        metrics = _task(spec, job)
        found.append((metrics, [(s["prompt_hash"], s["responses"]) for s in samples(job)]))
        assert job.tokenizer.pad_token is None
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0][1] != found[1][1]
    assert model.training
    assert all(dict(model.named_parameters())[n] is p and torch.equal(p, before[n]) for n, p in parameters.items())
    assert set(vars(model)) == attributes
    assert torch.equal(torch.get_rng_state(), python_state)
    assert build(job.location(spec), spec.revision, 2) is build(job.location(spec), spec.revision, 2)


def test_a_task_of_ones_own_that_generates(tmp_path):
    model = untied(tiny_opt(VOCAB, context=256))
    prompt = prompt_for(model)
    filters = [
        {"name": "strict-match", "filter": [{"function": "take_first"}]},
        {"name": "flexible, extract", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
    ]  # fmt: skip
    path = own_task(tmp_path / "own", filter_list=filters)
    metrics, job = run(tmp_path, path, model, prompt, batch=4)
    names = {"exact_match_strict-match", "exact_match_flexible__extract"}
    ends = {f"{n}_stderr" for n in names}
    assert set(metrics) == {"score", "score_stderr", "documents", *names, *ends}
    assert job.record["task"]["metric"] == "exact_match_strict-match"
    assert {s["filter"] for s in samples(job)} == {"strict-match", "flexible, extract"}
    texts = [s["responses"] for s in samples(job)]
    assert all(isinstance(t, list) and isinstance(t[0], str) for t in texts)
    assert [s["responses"] for s in samples(run(tmp_path, path, model, prompt, batch=1)[1])] == texts
    assert [s["responses"] for s in samples(run(tmp_path, path, model, None)[1])] != texts


def test_examples_are_drawn_alike_each_time(tmp_path):
    path = own_task(tmp_path / "own")
    drawn = [[s["prompt_hash"] for s in samples(run(tmp_path, path, limit=4, shots=2)[1])] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != [s["prompt_hash"] for s in samples(run(tmp_path, path, limit=4)[1])]


def test_errors_are_by_formula_or_bootstrap_or_left_out(tmp_path, capfd):
    likelihood = {"doc_to_text": "{{question}}", "generation_kwargs": None, "training_split": None}
    metrics = [{"metric": "perplexity"}, {"metric": "acc"}]
    path = own_task(tmp_path / "own", output_type="loglikelihood", metric_list=metrics, **likelihood)
    found, job = run(tmp_path, path)
    assert set(found) == {"score", "score_stderr", "documents", "acc", "acc_stderr", "perplexity", "perplexity_stderr"}
    assert job.record["task"]["metric"] == "acc"
    lls = torch.tensor([s["perplexity"] for s in samples(job)], dtype=torch.float64)
    assert found["perplexity"] == pytest.approx(float((-lls.mean()).exp()))
    assert found["perplexity_stderr"] > 0
    assert run(tmp_path, path)[0] == found
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    path = own_task(tmp_path / "all", **likelihood | rolling, metric_list=[{"metric": "word_perplexity"}])
    assert set(run(tmp_path, path)[0]) == {"score", "word_perplexity", "documents"}  # the harness knows no error of it
    one, _ = run(tmp_path, own_task(tmp_path / "one"), limit=1)
    assert set(one) == {"score", "exact_match", "documents"}  # one document has no spread
    assert capfd.readouterr().out == ""


def test_numbers_that_are_none_are_errors(tmp_path):
    model = untied(tiny_llama(VOCAB, context=1024))
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    spec, job = job_for(tmp_path, "ctp_piqa.yaml", model, limit=2)
    with pytest.raises(FloatingPointError, match="document 0: a log-likelihood is nan"):
        _task(spec, job)


def test_what_cannot_fit_is_one_sentence(tmp_path):
    model = tiny_opt(VOCAB, context=64)
    spec, job = job_for(
        tmp_path, "ctp_piqa.yaml", model, prompt_for(model, 40), limit=2
    )  # answers longer than 24 tokens
    with pytest.raises(ValueError, match="the task ctp_piqa does not fit a context of 24 tokens"):
        _task(spec, job)
    path = own_task(tmp_path / "own", generation_kwargs={"until": ["\n"], "max_gen_toks": 99})
    spec, job = job_for(tmp_path, path, model)
    with pytest.raises(ValueError, match=r"the task sums does not fit a context of 64 tokens: .*\(99\)"):
        _task(spec, job)


def test_a_task_that_the_harness_cannot_make_is_one_sentence(tmp_path):
    for fields, why in [({"doc_to_text": "{{nope}}"}, "nope"), ({"test_split": "dev"}, "dev"), ({"odd": 1}, "odd")]:
        spec, job = job_for(tmp_path, own_task(tmp_path / "own", **fields))
        with pytest.raises(ValueError, match=f"the harness cannot make the task sums: .*{why}"):
            _task(spec, job)
