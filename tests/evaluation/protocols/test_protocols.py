"""The likelihood, fluency and judge protocols."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hf_kedit.data import load_edit_dataset
from hf_kedit.errors import EvaluationError
from hf_kedit.evaluation import (
    CallableJudge,
    ExactMatchJudge,
    Fluency,
    Generation,
    HFModelJudge,
    Judged,
    Likelihood,
    OpenAICompatibleJudge,
    Sampling,
    evaluate_edits,
    functional,
    generate_answers,
    score_pairs,
)
from hf_kedit.evaluation.measures.judges import INSTRUCTION, parse_verdict
from hf_kedit.evaluation.measures.metrics import text_agreement
from hf_kedit.evaluation.protocols.base import Query

SAMPLES = Path(__file__).parents[2] / "data" / "samples"

# ---------------------------------------------------------------------- likelihood


@pytest.fixture
def old_and_new(rows):
    """The rows, with an old answer for the second and a neighbour whose answer is the new one."""
    rows[1]["ground_truth"] = ["Bergen"]
    return rows


def test_likelihood_scores_are_those_of_the_pairs(editable, tokenizer, old_and_new, cache):
    report = evaluate_edits(editable, old_and_new, protocol=("teacher_forced", "likelihood"), cache=cache)
    first, second, third = report.select("likelihood")
    prompt, neighbour = "The capital of Norland is", "The capital of Sudland is"
    editable.edit(old_and_new[:1])
    new, true, rome, lima = score_pairs(
        editable, tokenizer, [(prompt, "Lima"), (prompt, "Oslo"), (neighbour, "Rome"), (neighbour, "Lima")]
    )
    post = first["post"]["counterfact"]
    assert post["ES"] == [float(new.nll < true.nll)] == first["post"]["rewrite_acc"]
    assert post["EM"][0] == pytest.approx(math.exp(-new.nll) - math.exp(-true.nll), abs=1e-5)
    assert post["NS"][0] == float(rome.nll < lima.nll)
    assert post["NM"][0] == pytest.approx(math.exp(-rome.nll) - math.exp(-lima.nll), abs=1e-5)
    assert post["rewrite_exact"] == [float(new.exact)]
    assert len(post["PS"]) == 2 and len(post["NS"]) == 2
    # Westland's capital is Lima, which is also the new answer: neither can be preferred.
    reasons = {s["prompt"]: s["reason"] for s in first["skipped"]}
    assert "same text" in reasons["The capital of Westland is"]
    assert "portability" in reasons["The capital of the Norlands is"]
    assert "ground_truth" in third["skipped"][0]["reason"] and "rewrite_acc" not in third["post"]
    summary = report.summary("likelihood")
    scores = summary["post"]["counterfact"]
    assert scores["ES"] == (post["ES"][0] + second["post"]["counterfact"]["ES"][0]) / 2
    assert summary["n_per_entry"]["counterfact/ES"] == 2 and summary["n_per_entry"]["counterfact/NS"] == 1
    wanted = functional.harmonic_score([scores["ES"], scores["PS"], scores["NS"]])
    assert scores["S"] == wanted
    assert "counterfact" not in report.summary("teacher_forced")["post"]
    assert first["post"]["metric_meta"]["counterfact"]["comparable_group"] == "likelihood/success"


def test_an_unedited_model_keeps_its_preferences(tokenizer, gpt2, old_and_new, cache):
    from ..helpers import make_editable

    editable = make_editable(gpt2, tokenizer, lr=1e-30, num_steps=1)
    report = evaluate_edits(editable, old_and_new, protocol=Likelihood(), cache=cache)
    summary = report.summary()
    assert summary["post"]["locality"] == 1.0
    assert summary["pre"]["counterfact"] == summary["post"]["counterfact"]
    with pytest.raises(EvaluationError):
        Likelihood(scorer="token")


# ---------------------------------------------------------------------- fluency


def test_sampling_does_not_depend_on_the_batch(gpt2, tokenizer):
    prompts = ["The capital of Norland is", "Ada Bell was", "Jan", "What is the mother tongue of Piet?"]
    sampling = Sampling(top_k=5, seed=3)

    def texts(prompts, **kwargs):
        kwargs = {"cut_at_newline": False, "sampling": sampling, **kwargs}
        return [a.ids for a in generate_answers(gpt2, tokenizer, prompts, 12, **kwargs)]

    together = texts(prompts)
    assert together == [texts([p])[0] for p in prompts]
    assert together == texts(prompts[::-1], max_batch_rows=2)[::-1]
    assert together != texts(prompts, sampling=Sampling(5, seed=4))
    greedy = texts(prompts, sampling=None)
    assert together != greedy == texts(prompts, sampling=Sampling(1, 0))


def test_sampling_follows_the_distribution(gpt2, tokenizer):
    prompt = "The capital of Norland is"
    logits = gpt2(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    top = logits.topk(3)
    wanted = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    counts = dict.fromkeys(wanted, 0)
    n = 400
    for seed in range(n):
        drawn = generate_answers(gpt2, tokenizer, [prompt], 1, cut_at_newline=False, sampling=Sampling(3, seed))
        ids = drawn[0].ids or (tokenizer.eos_token_id,)
        counts[ids[0]] += 1  # a KeyError if a token outside of the top 3 was drawn
    for token, probability in wanted.items():
        assert counts[token] / n == pytest.approx(probability, abs=4 * math.sqrt(0.25 / n))


def test_fluency(editable, tokenizer, rows, cache):
    rows[1]["metadata"] = {"generation_prompts": ["Ada Bell was", "Ada Bell is known for"]}
    protocol = Fluency("words", max_total_tokens=40)
    report = evaluate_edits(editable, rows, protocol=("teacher_forced", protocol), cache=cache)
    record = report.select("fluency")[1]
    assert len(record["post"]["fluency"]["ngram_entropy"]) == 2
    assert set(record["post"]) == {"fluency", "metric_meta"}
    for text, value in zip(record["texts"], record["pre"]["fluency"]["ngram_entropy"], strict=True):
        assert value == functional.ngram_entropy(functional.clean_for_fluency(text["prompt"] + text["pre"]), "words")
    query = Query("Ada Bell was")
    answer = protocol.run(editable.base_model, tokenizer, [query, Query("Jan")], None)[0]
    assert 0 < len(answer.ids) <= 40 - len(tokenizer(query.prompt)["input_ids"])
    assert answer.text.startswith(record["texts"][0]["pre"][:5])
    summary = report.summary("fluency")
    assert summary["post"]["fluency"]["ngram_entropy"] > 0 and summary["scorer"] == "ngram_entropy (words)"
    assert "rewrite_acc" not in summary["post"]
    row = report.to_easyedit()[1]
    assert row["post"]["fluency"]["ngram_entropy"] == pytest.approx(
        sum(record["post"]["fluency"]["ngram_entropy"]) / 2
    )
    assert "bits" in str(report)


def test_fluency_where_the_context_is_short(editable, rows, cache):
    rows[0]["metadata"] = {"generation_prompts": ["The capital of Norland is Oslo. " * 6, "Ada"]}
    report = evaluate_edits(editable, rows[:1], protocol=Fluency("words"), cache=cache)
    assert len(report.cases[0]["texts"]) == 2


def test_settings_of_fluency_are_checked():
    with pytest.raises(EvaluationError, match="Did you mean 'words'"):
        Fluency("word")
    with pytest.raises(EvaluationError):
        Fluency("words", top_k=0)


# ---------------------------------------------------------------------- judges


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", True),
        ("a.", True),
        (" **A** ", True),
        ("(A)", True),
        ("A: CORRECT", True),
        ("A\nThe answer names the city.", True),
        ("A correct", True),
        ("CORRECT", True),
        ("Correct, it names the city.", True),
        ("B", False),
        ("b)", False),
        ("B - incorrect", False),
        ("INCORRECT", False),
        ("Incorrect because …", False),
        ("", None),
        ("   ", None),
        ("A long reply that never comes to the point", None),
        ("The answer is A", None),
        ("Apples", None),
        ("B's are rare", None),
        ("correctly done", None),
    ],
)
def test_parsing_verdicts(reply, verdict):
    assert parse_verdict(reply) is verdict


def test_a_judged_evaluation(editable, rows, cache):
    asked = []

    def judge(question, references, prediction):
        asked.append((question, tuple(references), prediction))
        if question.startswith("What is"):
            return None
        return 0.5 if question.startswith("The capital of Norland") else True

    report = evaluate_edits(editable, rows, protocol=[Generation(max_new_tokens=6), Judged(judge, 6)], cache=cache)
    judged, generated = report.select("judge")[0], report.select("generation")[0]
    wrote = {t["prompt"]: t["post"] for t in judged["texts"]}
    assert judged["post"]["rewrite_acc"] == [0.5 if wrote["The capital of Norland is"] else 0.0]
    reasons = {s["prompt"]: s["reason"] for s in judged["skipped"]}
    assert wrote["What is the capital of Norland?"] and wrote["Norland has the capital"]
    assert "could not be read" in reasons["What is the capital of Norland?"]
    assert len(judged["post"]["rephrase_acc"]) == 1
    assert judged["post"]["locality"] == generated["post"]["locality"]
    assert judged["texts"] == generated["texts"]
    assert ("The capital of Sudland is", ("Rome", "Roma"), wrote["The capital of Sudland is"]) in asked
    assert len(set(asked)) == len(asked)  # equal questions are asked once
    assert report.summary("judge")["scorer"] == "judge"


def test_every_group_must_be_judged_right(editable, rows, cache):
    rows[1]["portability"] = {
        "both": [{"prompt": "Ada Bell was", "ground_truth": [["Rome"], ["1998", "98"]], "match": "all"}]
    }
    verdicts = {("Rome",): 1.0, ("1998", "98"): 0.25}
    judge = CallableJudge(lambda q, r, p: verdicts.get(tuple(r), 1.0), name="table")
    report = evaluate_edits(editable, rows[1:2], protocol=Judged(judge, 6), cache=cache)
    written = next(t for t in report.cases[0]["texts"] if t["section"] == "portability")
    for half in ("pre", "post"):
        assert report.cases[0][half]["portability"]["both_acc"] == [0.25 if written[half] else 0.0]


def test_judges_that_need_no_model():
    judge = ExactMatchJudge()
    assert judge("q", ["Rome", "Roma"], "the roma.") == 1.0
    assert judge("q", ["Rome"], "Paris") == 0.0
    with pytest.raises(EvaluationError, match="returned 7"):
        CallableJudge(lambda q, r, p: 7)("q", ["a"], "b")
    with pytest.raises(EvaluationError, match="needs a judge"):
        Judged()
    with pytest.raises(EvaluationError, match="function"):
        Judged("gpt")
    with pytest.raises(EvaluationError, match="max_new_tokens"):
        Judged(judge, 0)
    assert Judged(judge).judge is judge


def test_a_model_in_memory_judges(gpt2, tokenizer):
    judge = HFModelJudge(gpt2, tokenizer, name="random")
    assert judge("q", ["a"], "b") in (None, 0.0, 1.0)
    assert judge.settings() == {"judge": "random", "prompt_version": "1"}


def test_verdicts_are_kept_in_a_file(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    calls = []

    def judge(question, references, prediction):
        calls.append(question)
        return None if question == "unreadable" else True

    first = CallableJudge(judge, "mine", cache_path=path)
    assert first("q", ["a"], "b") == 1.0 == first("q", ["a"], "b")
    assert first("unreadable", ["a"], "b") is None
    assert calls == ["q", "unreadable"]
    with path.open("a") as file:
        file.write('{"key": "cut o')  # killed while writing
    second = CallableJudge(judge, "mine", cache_path=path)
    assert second("q", ["a"], "b") == 1.0 and calls == ["q", "unreadable"]
    assert second("unreadable", ["a"], "b") is None and len(calls) == 3
    CallableJudge(judge, "another", cache_path=path)("q", ["a"], "b")
    assert len(calls) == 4


# ---------------------------------------------------------------------- an endpoint


class Endpoint:
    """An OpenAI-compatible server on the loopback interface; ``replies``: (status, body) in order, the last stays."""

    def __init__(self):
        self.replies = [(200, "A")]
        self.requests = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.path, dict(self.headers), body))
                status, text = endpoint.replies[0]
                if len(endpoint.replies) > 1:
                    endpoint.replies.pop(0)
                if callable(text):
                    text = text(body["messages"][0]["content"])
                content = (
                    text
                    if isinstance(text, bytes)
                    else json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                )
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", endpoint.url + "/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def remote(endpoint, **kwargs):
    return OpenAICompatibleJudge(endpoint.url, "judge-model", **{"api_key_env": None, "wait": 0.0, **kwargs})


def test_the_endpoint_is_asked_as_it_expects(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    judge = remote(endpoint, api_key_env="MY_KEY")
    assert judge("Who {prediction}?", ["Rome", "Roma"], "It is {references}.") == 1.0
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "judge-model" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    # Braces in the texts are texts, not places to be filled.
    assert "Question: Who {prediction}?" in text and "Answer of the model: It is {references}." in text
    assert "Rome | Roma" in text
    assert judge("Who {prediction}?", ["Rome", "Roma"], "It is {references}.") == 1.0
    assert len(endpoint.requests) == 1
    assert "secret" not in json.dumps(judge.settings())


def test_refusals_that_pass_are_tried_again(endpoint):
    endpoint.replies = [(503, b"busy"), (429, b"slow down"), (200, "B")]
    assert remote(endpoint)("q", ["a"], "b") == 0.0
    assert len(endpoint.requests) == 3


def test_refusals_that_stay_are_errors(endpoint):
    endpoint.replies = [(401, b"no")]
    with pytest.raises(EvaluationError, match="401"):
        remote(endpoint)("q", ["a"], "b")
    assert len(endpoint.requests) == 1
    endpoint.replies = [(302, b"")]  # the key must not travel on
    with pytest.raises(EvaluationError, match="302"):
        remote(endpoint)("q", ["a"], "b")
    assert len(endpoint.requests) == 2
    endpoint.replies = [(500, b"broken")]
    with pytest.raises(EvaluationError, match="after 2 requests: 500"):
        remote(endpoint, retries=1)("q", ["a"], "b")
    endpoint.replies = [(200, b'{"error": "?"}')]
    with pytest.raises(EvaluationError, match="unknown form"):
        remote(endpoint)("q", ["a"], "b")


def test_falling_back_is_a_choice(endpoint, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(EvaluationError, match="NO_KEY"):
        remote(endpoint, api_key_env="NO_KEY")
    judge = remote(endpoint, api_key_env="NO_KEY", fallback="exact")
    assert judge("q", ["Rome"], "rome") == 1.0 and judge.fallbacks == 1 and endpoint.requests == []
    with pytest.raises(EvaluationError, match="http"):
        OpenAICompatibleJudge("localhost", "m", None)
    with pytest.raises(EvaluationError, match="lacks"):
        remote(endpoint, instruction="Is it right?")
    assert "{question}" in INSTRUCTION


def test_unreadable_replies_are_asked_for_again_and_then_left_out(endpoint):
    endpoint.replies = [(200, "Well, it depends"), (200, "A")]
    assert remote(endpoint)("q", ["a"], "b") == 1.0
    endpoint.replies = [(200, "Well, it depends")]
    assert remote(endpoint)("q", ["a"], "b") is None
    assert len(endpoint.requests) == 4


def test_many_verdicts_are_asked_for_at_once_and_kept_apart(endpoint):
    endpoint.replies = [(200, lambda text: "A" if "even" in text else "B")]
    judge = remote(endpoint, max_workers=8)
    items = [(f"number {i}", ["x"], "even" if i % 2 == 0 else "odd") for i in range(20)]
    judge.judge_all(items + items)
    assert len(endpoint.requests) == 20
    assert [judge(*item) for item in items] == [float(i % 2 == 0) for i in range(20)]
    assert len(endpoint.requests) == 20


def test_an_evaluation_with_an_endpoint(endpoint, editable, rows, cache):
    endpoint.replies = [(200, lambda text: "A" if "Reference answers: Lima\n" in text else "B")]
    report = evaluate_edits(editable, rows, protocol=Judged(remote(endpoint), 6), cache=cache)
    record = report.cases[0]
    written = next(t for t in record["texts"] if t["section"] == "rewrite")
    assert record["post"]["rewrite_acc"] == [1.0 if written["post"] else 0.0]
    assert report.summary()["scorer"] == "judge-model, prompt 1"
    assert report.cases[2]["post"]["rewrite_acc"] == [0.0]


# ---------------------------------------------------------------------- probes without answers


def test_the_first_tokens_of_a_continuation(editable, tokenizer, rows, cache):
    protocol = Generation(scorer="prefix_tokens", max_new_tokens=12)
    report = evaluate_edits(editable, rows, protocol=protocol, cache=cache)
    editable.edit(rows[0])
    for section, prompt, answers in (
        ("rewrite_acc", "The capital of Norland is", [rows[0]["target_new"]]),
        ("alias_acc", "The capital of the Norlands is", ["Lima"]),
    ):
        (said,) = generate_answers(editable, tokenizer, [prompt], 12, cut_at_newline=False)
        wanted = [tokenizer(" " + answer)["input_ids"] for answer in answers]
        best = max(sum(a == b for a, b in zip(said.ids, ids, strict=False)) / len(ids) for ids in wanted)
        post = report.cases[0]["post"]
        assert (post.get(section) or post["portability"][section])[0] == best
    meta = report.cases[0]["post"]["metric_meta"]["rewrite"]
    assert meta["comparable_group"] == "generation/prefix_tokens"
    editable.rollback("all")
    long = {**rows[0], "target_new": "Rome and a lot more than one token", "id": "long"}
    short = evaluate_edits(
        editable, [long], protocol=Generation(scorer="prefix_tokens", max_new_tokens=2), cache=cache
    )
    skipped = {s["prompt"]: s["reason"] for s in short.cases[0]["skipped"]}
    assert "max_new_tokens is 2" in skipped["The capital of Norland is"]
    with pytest.raises(EvaluationError, match="prompt_format='raw'"):
        Generation(scorer="prefix_tokens", prompt_format="qa")
    assert functional.prefix_share([1, 2, 3], [1, 9]) == 0.5 and functional.prefix_share([1], [1, 2]) == 0.5
    assert functional.prefix_share([], [1]) == functional.prefix_share([1], []) == 0.0


def test_an_answer_that_cannot_be_written_is_told(editable, rows, cache, caplog, monkeypatch):
    monkeypatch.setattr("hf_kedit.logging._said", set())
    evaluate_edits(editable, rows, protocol=Generation(max_new_tokens=6), cache=cache)
    assert "max_new_tokens" not in caplog.text
    long = {**rows[0], "target_new": "Rome and a lot more than one token could ever say", "id": "long"}
    evaluate_edits(editable, [long], protocol=Generation(max_new_tokens=2), cache=cache)
    assert "have more than max_new_tokens=2 tokens" in caplog.text


def test_probes_without_answers_are_compared_by_what_is_written(editable, cache):
    """As HalluEditBench's locality questions: there is no answer to feed, but there is a before and an after."""
    table = load_edit_dataset("halluedit/llama2", path=SAMPLES / "halluedit", limit=1)
    (probe,) = table[0]["locality"]
    assert probe["name"] == "locality_question" and probe["ground_truth"] == []
    report = evaluate_edits(editable, table, protocol=["teacher_forced", Generation(max_new_tokens=6)], cache=cache)
    written = report.select("generation")[0]
    (agreement,) = written["post"]["locality"]["locality_question_acc"]
    texts = next(t for t in written["texts"] if t["axis"] == "locality_question")
    assert agreement == text_agreement(texts["pre"], texts["post"])
    assert written["pre"]["locality"]["locality_question_output"] == [texts["pre"]]
    assert "locality_accuracy" not in written["post"]  # nothing says what would be right
    forced = report.select("teacher_forced")[0]
    assert "locality" not in forced["post"]
    (skipped,) = [s for s in forced["skipped"] if s["axis"] == "locality_question"]
    assert "there is no answer" in skipped["reason"]
    assert report.summary("generation")["n_per_entry"]["locality"] == 1
