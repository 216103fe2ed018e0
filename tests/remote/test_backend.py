"""A client for servers that speak OpenAI's protocol, against servers that limit, dawdle, break off and gossip."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, OpenAICompatibleBackend, evaluate_edits
from hf_kedit.errors import BackendError, EvaluationError
from hf_kedit.remote import TargetScores
from hf_kedit.remote.endpoint import LONGEST_WAIT
from tests.remote.servers import Reply, Script, Server, chat, serving

KEY = "sk-very-secret-0123"
ERROR = {"error": {"message": f"Incorrect API key provided: {KEY}.", "type": "invalid"}}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)


def backend(server: Server, **settings: Any) -> OpenAICompatibleBackend:
    settings = {"wait": 0.0, "retries": 2, "timeout": 5.0, **settings}
    return OpenAICompatibleBackend(server.url, "m", "MY_KEY", **settings)


def in_order(*replies: Reply) -> Script:
    return lambda path, body, number: replies[min(number, len(replies)) - 1]


def test_a_chat_is_asked_as_the_protocol_says() -> None:
    with serving(in_order(chat(" Rome. And more"))) as server:
        options = {"seed": 3, "max_tokens": None, "max_completion_tokens": 9}
        asking = backend(server, system="Be brief.", options=options)
        assert asking.generate("Where?", 5, ("."), 0.5) == " Rome. And more"
        conversation = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Who?"}]
        asking.generate(conversation, 5)
    (path, headers, first), (_, _, second) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert first == {
        **{"model": "m", "messages": turns, "temperature": 0.5},
        **{"stop": ["."], "seed": 3, "max_completion_tokens": 9},
    }
    assert second["messages"] == conversation


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_empty_conversation_is_not_sent(system: str | None) -> None:
    with serving(in_order(chat("Yes?"))) as server, pytest.raises(BackendError, match="at least one message"):
        backend(server, system=system).generate([], 5)
    assert not server.asked


def test_a_text_is_completed() -> None:
    with serving(in_order(Reply({"choices": [{"text": " Rome"}]}))) as server:
        asking = backend(server, api="completions")
        assert asking.generate("It is in", 4) == " Rome"
        with pytest.raises(BackendError, match="needs api='chat'"):
            asking.generate([{"role": "user", "content": "Who?"}], 4)
    ((path, _, body),) = server.asked
    assert path == "/v1/completions"
    assert body == {"model": "m", "prompt": "It is in", "max_tokens": 4, "temperature": 0.0}


@pytest.mark.parametrize(
    "bad",
    [
        Reply({"error": "slow down"}, 429, {"Retry-After": "0"}),
        Reply({"error": "slow down"}, 429, {"Retry-After": format_datetime(datetime.now(UTC) - timedelta(hours=1))}),
        Reply({"error": "slow down"}, 429, {"Retry-After": "soon"}),
        Reply({"error": "slow down"}, 429, {"Retry-After": "Wed, 99 Oct 99999999999 07:28:00 GMT"}),
        Reply(b"<html>busy</html>", 503),
        Reply(b"<html>not JSON</html>"),
        Reply({"choices": []}),
        Reply({"choices": [{"message": {"content": 7}}]}),
        Reply(b'{"choices": [{"message": {"content": "Ro'),
        Reply({"choices": [{"message": {"content": "Rome"}}]}, cut=10),
    ],
    ids=[
        "limit",
        "past date",
        "no time",
        "no such year",
        "busy",
        "no JSON",
        "no choice",
        "no text",
        "half JSON",
        "broken off",
    ],
)
def test_what_may_pass_is_asked_again(bad: Reply) -> None:
    with serving(in_order(bad, chat("Rome"))) as server:
        assert backend(server).generate("Where?", 4) == "Rome"
        assert len(server.asked) == 2
    with serving(in_order(bad)) as server:
        with pytest.raises(BackendError, match="cannot be had after 3 requests"):
            backend(server).generate("Where?", 4)
        assert len(server.asked) == 3


def test_a_limit_is_waited_for_but_not_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("hf_kedit.remote.endpoint.time.sleep", slept.append)
    limited = Reply({"error": "slow down"}, 429, {"Retry-After": "7"})
    with serving(in_order(limited, Reply({}, 503), chat("Rome"))) as server:
        assert backend(server, wait=0.25).generate("Where?", 4) == "Rome"
    assert slept == [7.0, 0.5]
    later = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(hours=2))}
    with serving(in_order(Reply({}, 429, later))) as server:
        with pytest.raises(BackendError, match=r"429.*asks to wait 7\d\d\d seconds"):
            backend(server).generate("Where?", 4)
        assert len(server.asked) == 1
    a_bit_more = {"Retry-After": f"{LONGEST_WAIT + 1:.0f}"}
    with serving(in_order(Reply({}, 429, a_bit_more))) as server, pytest.raises(BackendError, match="asks to wait 61"):
        backend(server).generate("Where?", 4)
    assert slept == [7.0, 0.5]


def test_a_server_that_says_nothing_is_given_up() -> None:
    with serving(in_order(Reply(silent=True))) as server, pytest.raises(BackendError, match=r"within 0\.3 seconds"):
        backend(server, timeout=0.3, retries=0).generate("Where?", 4)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_says_why_and_is_not_repeated(status: int) -> None:
    with serving(in_order(Reply({"error": {"message": "there is no model 'm'"}}, status))) as server:
        with pytest.raises(BackendError, match=f"{status}.*there is no model 'm'"):
            backend(server).generate("Where?", 4)
        assert len(server.asked) == 1


def gossip() -> Iterator[Reply]:
    yield Reply(ERROR, 401)
    yield Reply(ERROR, 503)
    yield Reply(ERROR)
    yield Reply(KEY.encode())


@pytest.mark.parametrize("reply", list(gossip()), ids=["refused", "busy", "good status", "no JSON"])
def test_no_message_holds_the_key(reply: Reply, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serving(in_order(reply)) as server:
        asking = backend(server, retries=1)
        with pytest.raises(BackendError) as caught:
            asking.generate("Where?", 4)
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in f"{error!r} {error}"
        error = error.__cause__
    assert KEY not in caplog.text + repr(asking) + str(vars(asking))


def test_an_answer_with_the_key_is_neither_shown_nor_saved(tmp_path: Any) -> None:
    with serving(in_order(chat(f"Your key is {KEY}"))) as server:
        model = EditableModel.from_backend(backend(server))
        assert model.generate("What is my key?") == "Your key is …"
        rows = [{"prompt": "What is my key?", "target_new": "secret"}]
        report = evaluate_edits(model, rows, protocol="generation", output_dir=tmp_path / "run")
        report.to_html(tmp_path / "report.html")
        report.to_json(tmp_path / "report.json")
        model.edit(rows)
        model.save_pretrained(tmp_path / "edits")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 6
    assert not [file for file in files if KEY.encode() in file.read_bytes() or b"127.0.0.1" in file.read_bytes()]


def test_the_key_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY")
    with serving(in_order(chat("Rome"))) as server:
        with pytest.raises(BackendError, match="the environment variable MY_KEY"):
            backend(server).generate("Where?", 4)
        assert not server.asked
        with pytest.raises(BackendError, match="name of an environment variable"):
            OpenAICompatibleBackend(server.url, "m", KEY)
        OpenAICompatibleBackend(server.url, "m", None).generate("Where?", 4)
        assert "Authorization" not in server.asked[0][1]


@pytest.mark.parametrize(
    "settings",
    [
        {"api": "responses"},
        {"max_workers": 0},
        {"retries": -1},
        {"timeout": 0},
        {"api": "completions", "system": "x"},
        {"system": 5},
        {"system": "\ud83d"},
        {"options": 5},
        {"options": {"seed": torch.tensor(1)}},
        {"options": {"seed": float("nan")}},
    ],
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(BackendError):
        OpenAICompatibleBackend("http://localhost/v1", "m", None, **settings)


def test_one_text_ends_an_answer_as_a_list_of_it_does() -> None:
    with serving(lambda path, body, number: Reply({"choices": [{"message": {"content": "the END"}}]})) as server:
        backend(server).generate("Where?", 4, "END")
        assert server.asked[0][2]["stop"] == ["END"]


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": 5},
        {"prompt": None},
        {"prompt": ["Where?"]},
        {"prompt": [{"role": "user"}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]},
        {"prompt": "\ud83d"},
        {"stop": 5},
        {"stop": [""]},
        {"stop": ["a", 5]},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"temperature": float("nan")},
        {"temperature": -1},
    ],
)
def test_what_cannot_be_asked_is_not_sent(asked: dict[str, Any]) -> None:
    with serving(lambda path, body, number: Reply({})) as server:
        with pytest.raises(BackendError):
            backend(server).generate(**{"prompt": "Where?"} | asked)
        assert not server.asked


# ---------------------------------------------------------------------- log-probabilities


def echoing(path: str, body: dict[str, Any], number: int) -> Reply:
    """Repeats the prompt token by token (words behind their spaces) and adds one more, as servers with ``echo`` do."""
    words = body["prompt"].split(" ")
    tokens = ["<s>", words[0], *(f" {word}" for word in words[1:]), " indeed"]
    values = [None, -3.0, *(-2.0 for _ in tokens[2:])]
    best: list[Any] = [None, *({"the": -0.5} for _ in tokens[1:])]
    if tokens[-2] == " Rome":  # two tokens, of which the model would have written the last
        tokens[-2:-1] = [" Ro", "me"]
        values[-2:-1] = [-1.5, -0.25]
        best[-2:-1] = [{" Pa": -0.5}, {"me": -0.25}]
    return Reply({"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": values, "top_logprobs": best}}]})


def test_log_probabilities_of_given_texts() -> None:
    with serving(echoing) as server:
        asking = backend(server, api="completions")
        assert asking.loglikelihood("It is in", " Rome") == pytest.approx(-1.75)
        assert asking.loglikelihood("It is in", " old Rome") == pytest.approx(-3.75)
        scores = asking.target_scores("It is in ", "Rome")  # the space belongs to the token that ends in the target
        assert scores is not None and scores.most_probable == (False, True)
        body = server.asked[0][2]
        assert (body["prompt"], body["echo"], body["logprobs"]) == ("It is in Rome", True, 1)
        model = EditableModel.from_backend(asking)
        rows = [{"prompt": "It is in", "target_new": "Rome", "ground_truth": "Paris"}]
        report = evaluate_edits(model, rows, protocol=["teacher_forced", "likelihood"])
    assert report.summary("teacher_forced")["pre"]["rewrite_acc"] == 0.5
    margin = math.exp(-1.75 / 2) - math.exp(-2)  # per token, of " Ro" "me" and of " Paris"
    assert report.summary("likelihood")["pre"]["counterfact"]["EM"] == pytest.approx(margin)


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"tokens": ["x"], "token_logprobs": [-1.0]},
        {"tokens": ["It is in", " Rome"], "token_logprobs": [None, None]},
    ],
    ids=["none", "another text", "no numbers"],
)
def test_a_server_without_them_has_none(said: Any) -> None:
    with serving(in_order(Reply({"choices": [{"text": "", "logprobs": said}]}))) as server:
        asking = backend(server, api="completions")
        assert asking.loglikelihood("It is in", " Rome") is None
        assert backend(server).loglikelihood("It is in", " Rome") is None  # a chat is not asked
        assert len(server.asked) == 1
        with pytest.raises(EvaluationError, match="gives no log-probabilities"):
            rows = [{"prompt": "It is in", "target_new": "Rome"}]
            evaluate_edits(EditableModel.from_backend(asking), rows, protocol="teacher_forced")


class Sums:
    """A backend that gives one logarithm for a whole target."""

    name = "sums"

    def __init__(self, probability: float):
        self.value = math.log(probability)

    def generate(self, prompt: Any, max_new_tokens: int, stop: Any, temperature: float) -> str:
        return ""

    def loglikelihood(self, prompt: str, target: str) -> float:
        return self.value


@pytest.mark.parametrize(("probability", "right"), [(0.6, 1.0), (0.4, 0.0)])
def test_one_logarithm_tells_what_is_certain(probability: float, right: float) -> None:
    model = EditableModel.from_backend(Sums(probability))
    report = evaluate_edits(model, [{"prompt": "It is in", "target_new": "Rome"}], protocol="teacher_forced")
    assert report.summary()["pre"]["rewrite_acc"] == right


class Scored(Sums):
    """Says what it is given, token by token."""

    def __init__(self, scores: Any):
        self.scores = scores

    def target_scores(self, prompt: str, target: str) -> Any:
        return self.scores


def test_tokens_without_their_rivals_are_certain_from_one_half_on() -> None:
    model = EditableModel.from_backend(Scored(TargetScores((math.log(0.6), math.log(0.4)), ())))
    report = evaluate_edits(model, [{"prompt": "It is in", "target_new": "Rome"}], protocol="teacher_forced")
    assert report.summary()["pre"]["rewrite_acc"] == 0.5


@pytest.mark.parametrize(
    "scores",
    [
        5,
        ((-1.0,), (True,)),
        TargetScores((), ()),
        TargetScores((float("nan"),), (True,)),
        TargetScores((3.0,), (True,)),
        TargetScores((-1.0, -2.0), (True,)),
        TargetScores(("much",), (True,)),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_logarithm_of_a_probability_is_no_score(scores: Any) -> None:
    model = EditableModel.from_backend(Scored(scores))
    with pytest.raises(BackendError, match="no logarithm"):
        evaluate_edits(model, [{"prompt": "It is in", "target_new": "Rome"}], protocol="teacher_forced")
