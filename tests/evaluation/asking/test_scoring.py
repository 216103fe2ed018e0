"""Scoring and generation on tiny models: batches, boundaries, and leaving everything as it was."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig

from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import Unscored, generate_answers, score_pairs, try_score_pairs
from hf_kedit.tokens import separator_between
from tests.test_tokens import tokenizer as tokenizer_of_kind

from ..helpers import tiny_gpt2

PAIRS = [
    ("The capital of Norland is", "Oslo"),
    ("The capital of Sudland is", "Rome and a lot more than one token"),
    ("Q", "railway"),
    ("What is the mother tongue of Piet? A rather long question, is it not?", "Norland"),
    ("ends in a space ", "Oslo"),
    ("ends in a line\n", "Oslo"),
    ("首都是", "東京"),
    ("The capital of Norland is", "Oslo"),
]


def reference(model, tokenizer, prompt, target):
    """Unbatched: predictions and mean NLL of the ids that tokenising prompt and joint text gives."""
    joint = "" if prompt[-1].isspace() or ord(target[0]) > 0x2E80 else " "
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + joint + target, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, start - 1 : -1].float()
    target_ids = ids[0, start:]
    return (
        target_ids.tolist(),
        logits.argmax(-1).tolist(),
        float(torch.nn.functional.cross_entropy(logits, target_ids)),
    )


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("order", [1, -1])
def test_equal_to_unbatched_whatever_the_batch(gpt2, tokenizer, batch, order):
    pairs = PAIRS[::order]
    for (prompt, target), score in zip(pairs, score_pairs(gpt2, tokenizer, pairs, max_batch_rows=batch), strict=True):
        target_ids, pred_ids, nll = reference(gpt2, tokenizer, prompt, target)
        assert (score.prompt, score.target) == (prompt, target)
        assert list(score.target_ids) == target_ids
        assert list(score.pred_ids) == pred_ids
        assert score.nll == pytest.approx(nll, abs=1e-5)
        assert score.sum_nll == pytest.approx(score.nll * len(target_ids))
        assert score.exact == (pred_ids == target_ids)


def test_t5_scores_the_shifted_decoder(t5, tokenizer):
    pairs = PAIRS[:4]
    for (prompt, target), score in zip(pairs, score_pairs(t5, tokenizer, pairs), strict=True):
        labels = tokenizer(target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = t5(**tokenizer(prompt, return_tensors="pt"), labels=labels)
        assert list(score.pred_ids) == output.logits[0].argmax(-1).tolist()
        assert score.nll == pytest.approx(float(output.loss), abs=1e-5)


def test_equal_pairs_are_computed_once(gpt2, tokenizer):
    rows = []
    handle = gpt2.transformer.wte.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    scores = score_pairs(gpt2, tokenizer, [PAIRS[0]] * 5 + [PAIRS[1]])
    handle.remove()
    assert sum(rows) == 2
    assert scores[0] == scores[4] != scores[5]


def test_an_empty_prompt_is_predicted_from_the_end_token(gpt2, tokenizer):
    (score,) = score_pairs(gpt2, tokenizer, [("", "Oslo")])
    ids = tokenizer("Oslo")["input_ids"]
    with torch.no_grad():
        logits = gpt2(torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0, :-1]
    assert list(score.target_ids) == ids
    assert list(score.pred_ids) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["bpe-trim", "spm", "world-gpt2", "world-llama"])
@pytest.mark.parametrize("prompt", ["The capital is", "The capital is ", "Q: where?\nA:", "A list:\n", "首都是", ""])
def test_a_target_is_the_end_of_the_joint_text(kind, prompt):
    """With BOS or without, behind white space, with the end-of-text token as target: the target is scored."""
    tokenizer = tokenizer_of_kind(kind)
    for target in ("Paris", tokenizer.eos_token):  # words that all of them know
        model = tiny_gpt2(tokenizer)
        (score,) = score_pairs(model, tokenizer, [(prompt, target)])
        joint = separator_between(prompt, target)
        ids = tokenizer(prompt + joint + target, add_special_tokens=False)["input_ids"]
        assert tuple(ids[-len(score.target_ids) :]) == score.target_ids
        said = tokenizer.decode(score.target_ids, skip_special_tokens=False)
        assert said.strip() == target
        assert len(score.pred_ids) == len(score.target_ids) > 0 and math.isfinite(score.nll)


def test_separator_is_respected(gpt2, tokenizer):
    default, joined = (score_pairs(gpt2, tokenizer, [("capital", "Oslo")], separator=s)[0] for s in (None, ""))
    assert default.target_ids == tuple(tokenizer(" Oslo")["input_ids"])
    assert joined.target_ids == tuple(tokenizer("Oslo")["input_ids"])


def test_a_long_prompt_loses_its_left_and_a_long_target_is_refused(gpt2, tokenizer):
    prompt = "word " * 200 + "The capital of Norland is"
    (score,) = score_pairs(gpt2, tokenizer, [(prompt, "Oslo")])
    ids = tokenizer(prompt + " Oslo")["input_ids"]
    assert score.truncated == len(ids) - 1 - gpt2.config.n_positions
    with torch.no_grad():
        logits = gpt2(torch.tensor([ids[:-1][-gpt2.config.n_positions :]])).logits[0]
    assert list(score.pred_ids) == logits[-len(score.target_ids) :].argmax(-1).tolist()
    results = try_score_pairs(gpt2, tokenizer, [("a", "word " * 200), ("a", " "), PAIRS[0]])
    assert isinstance(results[0], Unscored) and "context of 96" in results[0].reason
    assert isinstance(results[1], Unscored) and "empty" in results[1].reason
    assert results[2] == score_pairs(gpt2, tokenizer, [PAIRS[0]])[0]
    with pytest.raises(EvaluationError, match="pair 1"):
        score_pairs(gpt2, tokenizer, [PAIRS[0], ("a", " ")])


def test_a_collapsed_model_is_never_right(gpt2, tokenizer):
    with torch.no_grad():
        gpt2.transformer.wte.weight.fill_(float("nan"))
    (score,) = score_pairs(gpt2, tokenizer, [PAIRS[0]])
    assert set(score.pred_ids) == {-1}
    assert score.token_acc == 0.0 and not score.exact


def test_model_and_tokenizer_are_left_as_they_were(gpt2, tokenizer):
    gpt2.train()
    gpt2.transformer.h[0].eval()
    modes = {name: module.training for name, module in gpt2.named_modules()}
    own = gpt2.generation_config
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    first = score_pairs(gpt2, tokenizer, PAIRS)
    assert first == score_pairs(gpt2, tokenizer, PAIRS)  # dropout would differ
    generate_answers(gpt2, tokenizer, ["The capital"], 4)
    assert {name: module.training for name, module in gpt2.named_modules()} == modes
    assert all(p.requires_grad for p in gpt2.parameters())
    assert gpt2.generation_config is own
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)


# ---------------------------------------------------------------------- generation


def greedy(model, tokenizer, prompt, n):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(n):
        with torch.no_grad():
            token = int(model(ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return ids[0, len(tokenizer(prompt)["input_ids"]) :].tolist()


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_greedy_equals_a_plain_loop(gpt2, tokenizer, batch):
    prompts = [p for p, _ in PAIRS]
    answers = generate_answers(gpt2, tokenizer, prompts, 6, cut_at_newline=False, max_batch_rows=batch)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.prompt == prompt
        assert list(answer.ids) == greedy(gpt2, tokenizer, prompt, 6)
        assert answer.text == tokenizer.decode(answer.ids).strip()


def test_checkpoint_defaults_do_not_leak(gpt2, tokenizer):
    prompts = [p for p, _ in PAIRS[:3]]
    plain = generate_answers(gpt2, tokenizer, prompts, 6)
    gpt2.generation_config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(set(plain[0].ids)),
        min_new_tokens=6,
        eos_token_id=0,
    )
    assert generate_answers(gpt2, tokenizer, prompts, 6) == plain


def favour(model, tokenizer, text):
    """Make the model say the tokens of ``text`` whatever stands before: a bias on the head, by position."""
    ids = tokenizer(text)["input_ids"]

    class Head(torch.nn.Module):
        step = 0

        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], model.config.vocab_size)
            logits[..., ids[min(self.step, len(ids) - 1)]] = 9.0
            self.step += 1
            return logits

    model.lm_head = Head()


def test_the_answer_ends_at_the_first_newline(gpt2, tokenizer):
    favour(gpt2, tokenizer, " Oslo, of course\nQ: and then what else is there to say?")
    answers = generate_answers(gpt2, tokenizer, ["The capital is", "Q"], 30)
    assert {a.text for a in answers} == {"Oslo, of course"}
    assert all(a.finished and len(a.ids) < 30 for a in answers)


def test_a_stop_string_cuts_only_where_it_is_asked_for(gpt2, tokenizer):
    favour(gpt2, tokenizer, " the U.S. of course<end>")
    assert generate_answers(gpt2, tokenizer, ["Q"], 30)[0].text == "the U.S. of course"
    favour(gpt2, tokenizer, " the U.S. of course<end>")
    assert generate_answers(gpt2, tokenizer, ["Q"], 30, stop_strings=["."])[0].text == "the U"


def test_generation_errors(gpt2, tokenizer):
    with pytest.raises(EvaluationError, match="max_new_tokens"):
        generate_answers(gpt2, tokenizer, ["Q"], 0)
    with pytest.raises(EvaluationError, match="context of 96"):
        generate_answers(gpt2, tokenizer, ["Q"], 96)
    with pytest.raises(EvaluationError, match="chat template"):
        generate_answers(gpt2, tokenizer, ["Q"], 4, prompt_format="chat")
    with pytest.raises(EvaluationError, match="prompt_format"):
        generate_answers(gpt2, tokenizer, ["Q"], 4, prompt_format="poem")


def test_prompt_formats_differ(gpt2, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}<bot>{% endfor %}"
    seen = []
    handle = gpt2.transformer.wte.register_forward_pre_hook(
        lambda module, args: seen.append(tokenizer.decode(args[0][0]))
    )
    try:
        for prompt_format in ("raw", "qa", "chat"):
            generate_answers(gpt2, tokenizer, ["who?"], 1, prompt_format=prompt_format)
    finally:
        handle.remove()
        tokenizer.chat_template = None
    assert seen == ["who?", "Please answer the question:\n\nQ: who?\nA:", "<user>who?<bot>"]


def test_t5_generation_is_the_same_in_any_batch(t5, tokenizer):
    prompts = [p for p, _ in PAIRS[:4]]
    alone = [generate_answers(t5, tokenizer, [p], 5)[0] for p in prompts]
    assert generate_answers(t5, tokenizer, prompts, 5) == alone
