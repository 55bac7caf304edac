"""Answers: greedy, the same in batches as one by one, and nothing but the answer."""

import copy

import pytest
import torch
from support.adapters import save_lora
from support.measured import ARCHITECTURES, job_for, loaded, read_json, rows_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctp.cells import Generation, HardPrompt
from ctp.evaluation import generation as module
from ctp.evaluation.generation import answer_tokens, plain_text, repeated_4grams
from ctp.execution import measure
from ctp.prompts.adapter import applied
from ctp.prompts.prefix import with_prompt
from ctp.prompts.rows import untrained_rows

QUESTIONS = ["Where is Long Beach?", "What?", "What is asparagus, and who eats it?", "Why", "Where is Tulsa, Oklahoma?"]


def answers(model, tokenizer, questions, prompt=None, new_tokens=64, batch=4):
    """The answers as texts."""
    found = module.answer_tokens(model, tokenizer, questions, prompt, new_tokens, batch)
    return [plain_text(tokenizer, ids) for ids in found]


def greedy(model, tokenizer, question, prompt, new):
    """The whole input through the model again for every token, up to an end of text."""
    row, out = torch.tensor([tokenizer(question)["input_ids"]]), []
    for _ in range(new):
        with torch.no_grad():
            given = {"input_ids": row} if prompt is None else {"inputs_embeds": with_prompt(model, row, prompt)}
            token = model(**given).logits[0, -1].argmax()
        if int(token) == tokenizer.eos_token_id:
            break
        out.append(int(token))
        row = torch.cat([row, token[None, None]], dim=1)
    return out


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batches_are_one_by_one_and_a_loop_by_hand(name, k):
    model, tokenizer = loaded(name)
    prompt = rows_for(model, k, scale=0.1) if k else None
    found = answer_tokens(model, tokenizer, QUESTIONS, prompt, 12, batch=3)
    assert found == answer_tokens(model, tokenizer, QUESTIONS, prompt, 12, batch=1)
    assert found == [greedy(model, tokenizer, question, prompt, 12) for question in QUESTIONS]
    assert len(set(map(tuple, found))) > 3  # the tiny BLOOM answers two of the five with one token for ever
    text = answers(model, tokenizer, QUESTIONS, prompt, 12, batch=2)
    assert text == [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def test_the_prompt_matters_and_is_taken_off():
    model, tokenizer = loaded("tiny-opt-2")
    before = set(vars(model))
    plain = answers(model, tokenizer, QUESTIONS, None, 8)
    assert answers(model, tokenizer, QUESTIONS, rows_for(model, 4), 8) != plain
    assert set(vars(model)) == before
    with pytest.raises(ValueError, match="must be"):
        answers(model, tokenizer, QUESTIONS, torch.ones(4, 9), 8)
    assert answers(model, tokenizer, QUESTIONS, None, 8) == plain


def test_with_lora_inside(tmp_path):
    model, tokenizer = loaded("tiny-opt-1")
    plain = answer_tokens(model, tokenizer, QUESTIONS, None, 8)
    save_lora(loaded("tiny-opt-1")[0], tmp_path / "lora", target_modules=["q_proj", "v_proj"])
    with applied(model, tmp_path / "lora"):
        found = answer_tokens(model, tokenizer, QUESTIONS, None, 8, batch=3)
        assert found == [greedy(model, tokenizer, question, None, 8) for question in QUESTIONS]
    assert found != plain
    assert answer_tokens(model, tokenizer, QUESTIONS, None, 8) == plain


def test_an_end_of_text_ends_an_answer_in_a_batch_of_longer_ones():
    model, tokenizer = loaded("tiny-llama")
    free = answer_tokens(model, tokenizer, QUESTIONS, None, 12)
    stop = free[2][3]  # the checkpoint calls what it would say there an end of text, beside the tokenizer's
    model.generation_config.eos_token_id = [stop, 5]
    found = answer_tokens(model, tokenizer, QUESTIONS, None, 12)
    ends = {stop, 5, tokenizer.eos_token_id}
    assert found == [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in free]
    assert len(found[2]) <= 3
    assert max(map(len, found)) > 3


def test_the_tokenizers_end_of_text_counts_without_the_checkpoints():
    model, tokenizer = loaded("tiny-llama")
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(answer_tokens(model, tokenizer, ["Why"], None, 3)[0][1])
    assert len(answer_tokens(model, tokenizer, ["Why"], None, 12)[0]) <= 1


def test_the_checkpoints_settings_do_not_count():
    model, tokenizer = loaded("tiny-opt-3")
    plain = answers(model, tokenizer, QUESTIONS, None, 10)
    own = model.generation_config
    own.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, num_beams=3, min_new_tokens=9, max_length=5)
    kept = copy.deepcopy(own)
    assert answers(model, tokenizer, QUESTIONS, None, 10) == plain
    assert model.generation_config is own
    assert own == kept


def test_model_and_tokenizer_are_left_as_they_were():
    model, tokenizer = loaded("tiny-opt-1")
    model.train()
    tokenizer.padding_side = "right"
    answers(model, tokenizer, QUESTIONS, rows_for(model, 2), 4)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def always(model, token):
    """The model, which answers whatever it is asked with this token alone."""
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(token), head.out_features))
    model.lm_head = head
    return model


def test_special_tokens_are_not_in_the_text():
    model, tokenizer = loaded("tiny-llama")
    assert answers(always(model, tokenizer.bos_token_id), tokenizer, QUESTIONS[:2], None, 4) == ["", ""]
    assert answers(always(model, 71), tokenizer, QUESTIONS[:2], None, 4) == [4 * tokenizer.decode([71])] * 2


def test_repetition():
    assert repeated_4grams([[1, 2, 3, 4, 5], [1, 2, 3, 4]]) == 0  # between answers nothing is repeated
    assert repeated_4grams([[7] * 8]) == pytest.approx(4 / 5)
    assert repeated_4grams([[1, 2, 3, 4, 1, 2, 3, 4], [9] * 3]) == pytest.approx(1 / 5)
    assert repeated_4grams([[1, 2, 3], []]) is None


def test_measure_on_a_real_model(tmp_path, trained):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    questions = ["Return the number of", "The class"]
    spec = Generation(questions="\n\n".join(questions) + "\n", new_tokens=24)
    numbers = measure._generation(spec, job_for(tmp_path, model, tokenizer))
    expected = [greedy(model, tokenizer, question, None, 24) for question in questions]
    assert read_json(tmp_path / "answers.json") == [
        {"question": question, "answer": tokenizer.decode(ids), "tokens": len(ids)}
        for question, ids in zip(questions, expected, strict=True)
    ]
    assert all(len(set(ids)) > 3 for ids in expected)  # it has learned to write more than one letter
    assert numbers == {
        "questions": 2,
        "tokens": sum(map(len, expected)),
        "tokens_per_answer": sum(map(len, expected)) / 2,
        "empty_answers": 0,
        "repeated_4grams": repeated_4grams(expected),
    }


def test_measure_counts_empty_answers_and_leaves_out_what_it_cannot_say(tmp_path):
    """An answer of blanks is empty, though it has tokens; where none has four tokens nothing is said of repetition."""
    model, tokenizer = loaded("tiny-llama")
    spec = Generation(questions="a\nb\nc", new_tokens=3)
    for token, tokens, empty in (
        (tokenizer.eos_token_id, 0, 3),
        (tokenizer("\n")["input_ids"][-1], 3, 3),
        (tokenizer("x")["input_ids"][-1], 3, 0),
    ):
        numbers = measure._generation(spec, job_for(tmp_path, always(model, token), tokenizer))
        expected = {"questions": 3, "tokens": 3 * tokens, "tokens_per_answer": tokens, "empty_answers": empty}
        assert numbers == expected


def test_the_papers_questions_behind_a_prompt(tmp_path):
    model, tokenizer = loaded("tiny-bloom")
    job = job_for(tmp_path, model, tokenizer, rows_for(model, 5))
    done = []
    job.progress = lambda *at: done.append(at)
    assert measure._generation(Generation(new_tokens=4), job)["questions"] == 8
    assert done == [(3, 8), (6, 8), (8, 8)]
    first = read_json(tmp_path / "answers.json")[0]
    assert first["question"] == "Please give the answers to this question: Where is Long Beach?"


@pytest.mark.parametrize(
    ("questions", "new", "message"),
    [
        (["ok", "x" * 2000], 50, r"^the question 'x{60}…': 3 prompt rows \+ 2001 tokens \+ 50 new ones = 2054 exceed"),
        ([], 5, r"^number of questions = 0, allowed"),
        (["ok"], 0, r"^new_tokens = 0, allowed: 1 and more"),
    ],
)
def test_what_is_not_allowed(questions, new, message):
    model, tokenizer = loaded("tiny-llama")
    with pytest.raises(ValueError, match=message):
        answers(model, tokenizer, questions, rows_for(model, 3), new)


def test_a_question_without_tokens_says_so(tmp_path):
    model, _ = loaded("tiny-llama")
    from ctp.models.tiny import byte_tokenizer

    with pytest.raises(ValueError, match=r"^the question '' has no tokens"):
        answers(model, byte_tokenizer(bos=False), ["Why", ""])
    with pytest.raises(ValueError, match=r"^number of questions = 0"):
        answers(model, byte_tokenizer(), [])
    with pytest.raises(ValueError, match="questions are blank lines only"):
        Generation(questions=" \n")


@pytest.mark.parametrize("name", ["tiny-opt-1", "tiny-llama", "tiny-bloom"])
def test_a_question_is_attached_to_a_hard_prompt_as_one_text(name):
    """No second beginning of text stands between them: the answer is that to the text and the question written out."""
    model, tokenizer = loaded(name)
    rows = untrained_rows(HardPrompt(text="Look closely."), model, tokenizer)
    asked = answer_tokens(model, tokenizer, ["Why?"], rows, 6, before="Look closely.")
    assert asked == answer_tokens(model, tokenizer, ["Look closely. Why?"], None, 6)
