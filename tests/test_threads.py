"""What docs/concurrency.md promises of threads, one promise after the other, in its order."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TextIteratorStreamer

from hf_kedit import EditableModel, EditRequest, IKEConfig, MENDConfig, ROMEConfig, evaluate_edits
from hf_kedit.config import config_class
from hf_kedit.engine import access
from hf_kedit.engine.access import access_to, alone, among_others
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import EditFailedError, ModelBusyError, WeightError
from hf_kedit.methods import ike
from hf_kedit.methods.mend import MENDEditor
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus
from hf_kedit.statistics.moments import SecondMoment
from hf_kedit.storage.repository import push_files
from hf_kedit.testing.hub import LoopbackHub
from tests.golden_cases import load_model
from tests.interrupts import at_every_step, interrupted_at, steps_of
from tests.models import tiny_model

NAMES = ["Mira Halvorsen", "Tobias Renner", "Anna Lind", "Peter Stam"]
FACTS = [EditRequest(prompt="{} plays the sport of", subject=n, target_new="tennis", id=n[0]) for n in NAMES]
FIELDS: dict[str, dict[str, Any]] = {
    "rome": {"v_num_grad_steps": 4, "v_lr": 2.0, "mom2_adjustment": False, "context_templates": ["{}"]},
    "grace": {"num_steps": 4, "lr": 1.0},
    "auto": {
        "encoder": "words",
        "base": {
            "edit_type": "rome",
            "v_num_grad_steps": 4,
            "v_lr": 2.0,
            "mom2_adjustment": False,
            "context_templates": ["{}"],
        },
    },
    "ft-m": {"num_steps": 3, "lr": 1e-2},
    "lora": {"num_steps": 3, "lr": 1e-2},
    "prompt": {},
    "model": {"retriever": "model"},
}
IDS = torch.tensor([[5, 6, 7, 8]])
PATIENCE = 60


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Threads take turns a hundred times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def fresh(method: str = "rome") -> EditableModel:
    _, tokenizer = load_model("llama")
    base = tiny_model("llama", vocab_size=max(len(tokenizer), 420), num_hidden_layers=2)
    kind = config_class("prompt" if method == "model" else method)
    return EditableModel(base, kind(**FIELDS[method]), tokenizer)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def prompt_ids(model: EditableModel, fact: EditRequest) -> torch.Tensor:
    return model.tokenizer(fact.filled_prompt, return_tensors="pt")["input_ids"]  # type: ignore[misc]


def says(model: EditableModel, ids: torch.Tensor) -> list[int]:
    return model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()


def digest(model: EditableModel) -> str:
    return model_digest(model.base_model)


def edit(model: EditableModel, fact: EditRequest) -> Any:
    return model.edit(fact, show_progress=False)


class Work:
    """A function that runs in a thread of its own."""

    def __init__(self, function: Callable[[], Any]):
        self._function, self._result = function, None
        self._thread = threading.Thread(target=self._run, daemon=True)  # a test that hangs must come to its end
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._result = error

    def result(self) -> Any:
        """What the function returned, or the error that it ended in."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it waits for ever"
        return self._result

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Start all functions at the same moment, each in a thread; their results, or the errors that they ended in."""
    gate = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        gate.wait(PATIENCE)
        return function()

    work = [Work(lambda f=function: run(f)) for function in functions]  # type: ignore[misc]
    return [one.result() for one in work]


def waits(model: EditableModel, work: Work) -> bool:
    """Whether another thread has come to wait for its turn (or has ended without waiting)."""
    queue, watch = access_to(model)._queue, threading.Event()
    for _ in range(1000):
        if work.is_done or queue:
            return not work.is_done
        watch.wait(0.005)
    raise AssertionError("it neither waits nor ends")


class Held:
    """A thread that is inside a block until it is told to go on."""

    def __init__(self, block: Callable[[], Any]):
        self._inside, self._go = threading.Event(), threading.Event()

        def hold() -> None:
            with block():
                self._inside.set()
                assert self._go.wait(PATIENCE)

        self._work = Work(hold)
        assert self._inside.wait(PATIENCE)

    def let_go(self) -> None:
        self._go.set()
        assert self._work.result() is None


def busy(model: EditableModel) -> bool:
    """Whether anything is left of anybody's turn."""
    lock = access_to(model)
    return bool(lock._owner or lock._depth or lock._running or lock._queue or lock._off)


# ---------------------------------------------------------------------- several threads run the model


@pytest.mark.parametrize("method", ["rome", "grace", "auto", "prompt", "model"])
def test_several_threads_generate(method: str) -> None:
    model = fresh(method)
    model.edit(FACTS[:2], show_progress=False)
    prompts = [prompt_ids(model, fact) for fact in FACTS]
    expected = [says(model, ids) for ids in prompts]
    for _ in range(4):
        assert at_once(*(lambda i=ids: says(model, i) for ids in prompts)) == expected  # type: ignore[misc]
    assert not busy(model)


@pytest.mark.parametrize(
    ("method", "at_the_same_time"),
    [("rome", True), ("grace", True), ("auto", True), ("prompt", True), ("model", False)],
)
def test_calls_run_at_the_same_time(method: str, at_the_same_time: bool) -> None:
    model = fresh(method)
    edit(model, FACTS[0])
    held = Held(model._turn)
    other = Work(lambda: logits(model, prompt_ids(model, FACTS[0])))
    assert waits(model, other) is not at_the_same_time
    held.let_go()
    assert isinstance(other.result(), torch.Tensor)


# ---------------------------------------------------------------------- one changes it


@pytest.mark.parametrize("method", ["rome", "ft-m", "grace", "auto", "prompt"])
def test_edits_of_several_threads_come_one_after_the_other(method: str) -> None:
    model = fresh(method)
    pristine = digest(model)
    made = at_once(*(lambda f=fact: edit(model, f) for fact in FACTS[:3]))  # type: ignore[misc]
    assert not [error for error in made if isinstance(error, Exception)], made
    order = [e.id for e in model.edits]
    assert sorted(order) == sorted(str(fact.id) for fact in FACTS[:3])
    one_by_one = fresh(method)
    for edit_id in order:
        edit(one_by_one, next(f for f in FACTS if f.id == edit_id))
    assert digest(model) == digest(one_by_one)
    assert torch.equal(logits(model), logits(one_by_one))
    model.rollback("all")
    assert digest(model) == pristine and not busy(model)


@pytest.mark.parametrize("method", ["rome", "grace", "prompt", "lora"])
def test_whoever_asks_beside_a_change_gets_the_model_before_or_after_it(method: str) -> None:
    model = fresh(method)
    ids = prompt_ids(model, FACTS[0])
    before, started, done = logits(model, ids), threading.Barrier(3), threading.Event()

    def ask() -> list[torch.Tensor]:
        seen = [logits(model, ids)]
        started.wait(PATIENCE)
        while not done.is_set():
            seen.append(logits(model, ids))
        return [*seen, logits(model, ids)]

    def change() -> None:
        started.wait(PATIENCE)
        edit(model, FACTS[0])
        done.set()

    *seen, changed = at_once(ask, ask, change)
    after = logits(model, ids)
    assert changed is None and not torch.equal(before, after)
    for answers in seen:
        kinds = [0 if torch.equal(x, before) else 1 if torch.equal(x, after) else 2 for x in answers]
        assert kinds == sorted(kinds) and kinds[0] == 0 and kinds[-1] == 1


def changes() -> list[str]:
    """The names that the page lists as changes."""
    page = (Path(__file__).parent.parent / "docs/concurrency.md").read_text(encoding="utf-8")
    return re.findall(r"`(\w+)`", page.partition("**Changing.**")[2].partition("have the model for themselves")[0])


@pytest.mark.parametrize("name", changes())
def test_changes_wait_for_calls_that_run_and_calls_for_them(name: str, tmp_path: Path) -> None:
    model = fresh()
    files = {"load_edits": "source", "import_lora": "adapter"}  # what they read before they take the model
    if name in files:
        other = fresh()
        edit(other, FACTS[0])
        other.save_pretrained(tmp_path)
    held = Held(lambda: among_others(model.base_model))
    arguments: dict[str, Any] = {} if name in ("unload", "merge_and_unload", "resolve_all") else {"a": 1}
    arguments = {files[name]: tmp_path} if name in files else arguments
    arguments = {"set_method": {"config": "rome"}, "edit": {"requests": FACTS[1]}}.get(name, arguments)
    changing = Work(lambda: getattr(model, name)(**arguments))
    assert waits(model, changing)
    asking = Work(lambda: logits(model))
    while len(access_to(model)._queue) < 2:
        threading.Event().wait(0.002)
    held.let_go()
    changing.result()
    assert isinstance(asking.result(), torch.Tensor) and not busy(model)


def test_an_edit_that_fails_is_seen_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches, the second of which fails: the first one lay on the weights for a while."""
    model = fresh()
    compute, ids, before = model._method.compute, prompt_ids(model, FACTS[0]), None
    inside, go = threading.Event(), threading.Event()

    def second_fails(batch: Any) -> Any:
        if batch[0].id == FACTS[1].id:
            inside.set()
            assert go.wait(PATIENCE)
            raise EditFailedError("no")
        return compute(batch)

    before = logits(model, ids)
    monkeypatch.setattr(model._method, "compute", second_fails)
    failing = Work(lambda: model.edit(FACTS[:2], show_progress=False))
    assert inside.wait(PATIENCE)
    assert not torch.equal(logits(model.base_model, ids), before)  # the first one
    asking, listing = Work(lambda: logits(model, ids)), Work(lambda: model.edits)
    assert waits(model, asking)
    go.set()
    assert isinstance(failing.result(), EditFailedError)
    assert torch.equal(asking.result(), before) and listing.result() == [] and not busy(model)


def test_first_come_first_served() -> None:
    """A thread that edits again and again lets others ask in between, and threads that ask let it edit."""
    model = fresh()
    lock, order = access_to(model), list[str]()
    held = Held(lambda: alone(model.base_model))

    def take_part(name: str, block: Any) -> None:
        with block(model.base_model):
            order.append(name)

    kinds = [("change 1", alone), ("ask 1", among_others), ("change 2", alone), ("ask 2", among_others)]
    work = []
    for name, block in kinds:
        work.append(Work(lambda n=name, b=block: take_part(n, b)))  # type: ignore[misc]
        while len(lock._queue) < len(work):
            threading.Event().wait(0.002)
    held.let_go()
    assert [one.result() for one in work] == [None] * 4
    assert order == [name for name, _ in kinds]


def test_models_do_not_wait_for_each_other() -> None:
    first, second = fresh(), fresh()
    with alone(first.base_model):
        assert not isinstance(at_once(lambda: edit(second, FACTS[0]))[0], Exception)


@pytest.mark.parametrize("seed", [0, 1])
def test_everything_at_once(seed: int, tmp_path: Path) -> None:
    model = fresh("rome")
    edit(model, FACTS[3])
    pristine, kept, ids = digest(fresh("rome")), digest(model), prompt_ids(model, FACTS[3])
    answer = says(model, ids)
    with model.disable_edits():
        plain = says(model, ids)

    def change(fact: EditRequest) -> None:
        for _ in range(3):
            edit(model, fact)
            model.rollback(str(fact.id))

    def switch() -> None:
        for _ in range(6):
            with model.disable_edits():
                assert digest(model) == pristine

    def keep() -> None:
        for n in range(3):
            model.save_pretrained(tmp_path / str(n))
            loaded = EditableModel.from_pretrained(tmp_path / str(n), base_model=fresh().base_model)
            assert "P" in [e.id for e in loaded.edits]

    def ask() -> None:
        for _ in range(6):
            with model.exclusive():
                if {e.id for e in model.edits} == {"P"}:
                    assert says(model, ids) == answer
            assert len(says(model, ids)) == len(answer)

    work = [lambda: change(FACTS[0]), lambda: change(FACTS[1]), switch, keep, ask, ask]
    random.Random(seed).shuffle(work)
    assert at_once(*work) == [None] * len(work)
    assert digest(model) == kept and [e.id for e in model.edits] == ["P"] and not busy(model)
    with model.disable_edits():
        assert says(model, ids) == plain


# ---------------------------------------------------------------------- saving


def test_saving_goes_on_beside_calls_and_waits_for_changes(tmp_path: Path) -> None:
    model = fresh()
    edit(model, FACTS[0])
    held = Held(lambda: among_others(model.base_model))
    for work in (
        lambda: model.save_pretrained(tmp_path / "a"),
        lambda: model.export_lora(tmp_path / "lora"),
        model.fingerprint,
        model.base_fingerprint,
    ):
        assert not isinstance(Work(work).result(), Exception)  # type: ignore[arg-type]
    held.let_go()
    held = Held(lambda: alone(model.base_model))
    saving = Work(lambda: model.save_pretrained(tmp_path / "b"))
    assert waits(model, saving)
    held.let_go()
    assert saving.result() is None
    assert (tmp_path / "a/edits.jsonl").read_bytes() == (tmp_path / "b/edits.jsonl").read_bytes()


class Gate:
    """Stands where the Hub takes its lock: requests have come, and are answered when it opens."""

    def __init__(self) -> None:
        self.asked, self.opened = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self.asked.set()
        assert self.opened.wait(PATIENCE)

    def __exit__(self, *error: object) -> None: ...


def shared_edits(folder: Path) -> None:
    there = fresh()
    edit(there, FACTS[0])
    there.export_lora(folder / "lora")
    there.push_to_hub("org/edits")
    push_files("org/lora", {path.name: path for path in (folder / "lora").iterdir()}, message="a LoRA")


def shared_statistics(folder: Path) -> None:
    there = fresh()
    weight = there.base_model.get_submodule(DOWN).weight
    there.statistics.put(DOWN, SecondMoment(torch.eye(weight.shape[1], dtype=torch.float64), 1000, "a text"))
    there.statistics.push_to_hub("org/statistics")


def shared_editor(folder: Path) -> None:
    MENDEditor.for_model(fresh().base_model, MENDConfig(modules=[DOWN])).push_to_hub("org/mend")


DOWN = "model.layers.1.mlp.down_proj"
FAR = "zsre"  # a data set that is fetched
STATISTICS = ROMEConfig(layers=[1], **{**FIELDS["rome"], "mom2_adjustment": True}, stats_dataset="org/statistics")
FETCHING: dict[str, tuple[Callable[[Path], None], Any, Callable[[EditableModel], Any]]] = {
    "saved edits": (shared_edits, None, lambda model: model.load_edits("org/edits")),
    "a LoRA": (shared_edits, None, lambda model: model.import_lora("org/lora")),
    "statistics": (shared_statistics, STATISTICS, lambda model: edit(model, FACTS[0])),
    "an editor": (shared_editor, None, lambda model: model.set_method(MENDConfig(editor="org/mend"))),
    "demonstrations": (lambda folder: None, IKEConfig(demonstrations=FAR, k=2), lambda model: edit(model, FACTS[0])),
}


@pytest.mark.parametrize("what", FETCHING)
def test_nobody_waits_for_the_hub(
    what: str, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    share, config, call = FETCHING[what]
    share(tmp_path)
    model, gate = fresh(), Gate()
    if config is not None:
        model.set_method(config)
    before, plain = digest(model), logits(model)

    def far_facts(name: str, **options: Any) -> list[EditRequest]:
        assert name == FAR
        gate.__enter__()
        return FACTS[1:]

    monkeypatch.setattr(hub, "lock", gate)
    monkeypatch.setattr(ike, "load_edit_dataset", far_facts)
    fetching = Work(lambda: call(model))
    try:
        assert gate.asked.wait(PATIENCE)
        assert not busy(model)
        says(model, IDS)
        with model.exclusive():
            assert digest(model) == before and not fetching.is_done
        if config is None:  # which edits without the Hub
            edit(model, FACTS[1])
            model.rollback("all")
            assert digest(model) == before and not fetching.is_done
    finally:
        gate.opened.set()
    assert not isinstance(result := fetching.result(), Exception), result
    ids = prompt_ids(model, FACTS[0])
    if what == "an editor":
        assert model.method_name == "mend" and digest(model) == before
    else:
        assert [e.id for e in model.edits] and not torch.equal(logits(model, ids), logits(fresh(), ids))
        assert torch.equal(logits(model), plain) is (what == "demonstrations")


def test_a_text_is_fetched_before_the_model_is_taken(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The moments are those of the same lines on this machine; the Hub is asked while others may use the model."""
    lines = [
        f"{name} was born in {year} and plays the sport of tennis." for year in range(1900, 1960) for name in NAMES
    ]
    Dataset.from_dict({"text": lines}).push_to_hub("org/text")
    model = fresh()
    taken: list[bool] = []

    class Watched:
        def __enter__(self) -> None:
            taken.append(busy(model))

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(hub, "lock", Watched())
    settings = {**FIELDS["rome"], "mom2_adjustment": True, "stats_tokens": 700, "stats_dir": str(tmp_path)}
    model.set_method(ROMEConfig(layers=[1], stats_dataset="org/text", **settings))
    edit(model, FACTS[0])
    assert taken and not any(taken)
    found = model.statistics.moments([DOWN])[DOWN]
    here = collect_moments(fresh().base_model, model.tokenizer, [DOWN], text_corpus(lines), tokens=700)[DOWN]
    assert found.count == 700 and torch.equal(found.total, here.total)


# ---------------------------------------------------------------------- edits that are switched off


def test_edits_that_one_thread_has_switched_off_are_off_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    plain = logits(model)
    edit(model, FACTS[0])
    before = digest(model)
    held = Held(model.disable_edits)
    assert torch.equal(Work(lambda: logits(model)).result(), plain)
    changes: list[Callable[[], Any]] = [
        lambda: edit(model, FACTS[1]),
        lambda: model.rollback("all"),
        model.merge_and_unload,
        lambda: model.exclusive().__enter__(),
    ]
    changing = Work(changes[0])
    assert waits(model, changing)
    assert torch.equal(Work(lambda: logits(model)).result(), plain)  # which does not wait for the one that waits
    held.let_go()
    assert [e.id for e in changing.result().edits] == [FACTS[1].id]
    model.rollback(str(FACTS[1].id))
    assert digest(model) == before

    monkeypatch.setattr(access, "OFF_SECONDS", 0.0)
    held = Held(model.disable_edits)
    for change in changes:
        error = Work(change).result()
        assert isinstance(error, ModelBusyError) and "disable_edits" in str(error)
    held.let_go()
    with model.disable_edits(), pytest.raises(WeightError, match="switched off"):  # one's own block
        edit(model, FACTS[1])
    assert digest(model) == before and len(model.edits) == 1 and not busy(model)


def test_edits_are_not_switched_while_a_call_runs() -> None:
    model = fresh()
    edit(model, FACTS[0])
    edited = logits(model)
    inside, go = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        inside.set()
        assert go.wait(PATIENCE)

    handle = model.base_model.model.layers[0].register_forward_hook(slow)  # type: ignore[union-attr, operator]
    call = Work(lambda: logits(model))
    assert inside.wait(PATIENCE)
    handle.remove()

    def plain() -> torch.Tensor:
        with model.disable_edits():
            return logits(model)

    off = Work(plain)
    assert waits(model, off)
    go.set()
    assert torch.equal(call.result(), edited) and not torch.equal(off.result(), edited)


def test_a_thread_that_is_started_inside_the_block_sees_the_original_model() -> None:
    """As with a streamer, which is read where the thread was started."""
    model = fresh()
    edit(model, FACTS[0])
    ids, tokenizer = prompt_ids(model, FACTS[0]), model.tokenizer
    with model.disable_edits():
        expected = says(model, ids)[ids.shape[1] :]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=PATIENCE)  # type: ignore[arg-type]
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "streamer": streamer}
        work = Work(lambda: model.generate(ids, **options))
        text = "".join(streamer)
        work.result()
    assert text == tokenizer.decode(expected)  # type: ignore[union-attr]


def test_a_block_may_be_left_in_another_thread() -> None:
    """As in a generator function whose steps a server runs wherever there is room."""
    model = fresh()
    edit(model, FACTS[0])
    before = digest(model)

    def steps() -> Iterator[str]:
        with model.disable_edits():
            yield digest(model)

    generator = steps()
    assert Work(lambda: next(generator)).result() == digest(fresh())
    assert isinstance(Work(lambda: next(generator)).result(), StopIteration)
    assert digest(model) == before and not busy(model)


# ---------------------------------------------------------------------- several steps as one


def test_a_model_for_oneself() -> None:
    model = fresh()
    ids = prompt_ids(model, FACTS[0])
    before = logits(model, ids)
    with model.exclusive():
        asking, changing = Work(lambda: logits(model, ids)), None
        assert waits(model, asking)
        edit(model, FACTS[0])
        with model.disable_edits():
            assert torch.equal(logits(model, ids), before)
        assert not torch.equal(logits(model, ids), before)
        changing = Work(lambda: edit(model, FACTS[1]))
        model.rollback("all")
    assert torch.equal(asking.result(), before)
    assert [e.id for e in changing.result().edits] == [FACTS[1].id]


def test_edits_that_are_measured_are_seen_by_nobody_else() -> None:
    model = fresh("ft-m")
    ids = prompt_ids(model, FACTS[0])
    before, seen, done = logits(model, ids), list[torch.Tensor](), threading.Event()

    def ask() -> None:
        while not done.is_set():
            seen.append(logits(model, ids))

    def measure() -> None:
        seen.append(logits(model, ids))
        try:
            evaluate_edits(model, FACTS[:2], progress=False)
        finally:
            done.set()

    assert at_once(ask, measure) == [None, None]
    assert all(torch.equal(x, before) for x in seen)


# ---------------------------------------------------------------------- whatever happens


def test_errors_let_others_in() -> None:
    model = fresh()
    for wrong in (
        lambda: model(input_ids="nothing"),
        lambda: model.generate("nothing"),
        lambda: model.edit([], batch_size=0),
        lambda: model.rollback("unknown"),
        lambda: model.set_method("unknown"),
        lambda: model.save_pretrained(__file__),
        lambda: evaluate_edits(model, FACTS, token_budget=0),
    ):
        with pytest.raises(Exception):  # noqa: B017
            wrong()
        assert not busy(model)


@pytest.mark.parametrize(
    "block",
    [
        lambda model: among_others(model.base_model),
        lambda model: alone(model.base_model),
        lambda model: frozen_eval(model.base_model),
        EditableModel.disable_edits,
        EditableModel.exclusive,
    ],
    ids=["running", "alone", "frozen_eval", "disable_edits", "exclusive"],
)
def test_ctrl_c_at_every_step(block: Callable[[EditableModel], Any]) -> None:
    model = fresh()
    edit(model, FACTS[0])
    before = digest(model)

    def enter_and_leave() -> None:
        with block(model):
            pass

    def check(_: int) -> None:
        assert not busy(model) and digest(model) == before

    assert at_every_step(enter_and_leave, check) > 20


def test_ctrl_c_anywhere_in_a_change_or_a_call() -> None:
    """A lock that the main thread has kept does not stop the main thread: it is looked for by name."""
    model = fresh("ft-m")
    ids, numbers = prompt_ids(model, FACTS[0]), random.Random(0)

    def begin_anew() -> None:
        if model.edits:
            model.rollback("all")
        edit(model, FACTS[1])

    for work in (lambda: edit(model, FACTS[0]), lambda: says(model, ids), lambda: model.rollback("all")):
        begin_anew()
        steps = steps_of(work)
        for number in numbers.sample(range(1, steps + 1), min(steps, 15)):
            begin_anew()
            assert interrupted_at(number, work)
            assert not busy(model), number


def test_ctrl_c_ends_the_waiting() -> None:
    model = fresh()
    edit(model, FACTS[3])
    for wait in (
        lambda: edit(model, FACTS[0]),
        lambda: logits(model),
        lambda: model.disable_edits().__enter__(),
        lambda: frozen_eval(model.base_model).__enter__(),
    ):
        held = Held(lambda: alone(model.base_model))
        timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        held.let_go()
        assert not busy(model) and len(model.edits) == 1


def test_an_edit_of_a_thread_is_not_undone_by_a_ctrl_c_elsewhere() -> None:
    """What is held back in the main thread says nothing about the others."""
    from hf_kedit.anatomy.switching import uninterrupted

    model = fresh()
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        assert not isinstance(Work(lambda: edit(model, FACTS[0])).result(), Exception)
    assert len(model.edits) == 1 and digest(model) != digest(fresh())


# ---------------------------------------------------------------------- calls inside of calls


def test_a_call_may_change_the_model_in_its_own_thread() -> None:
    """A hook that asks the unedited model: one thread, so that nothing has to wait."""
    model = fresh()
    edit(model, FACTS[0])
    seen = []

    def ask(*_: Any) -> None:
        if not seen:
            seen.append("")
            with model.disable_edits():
                seen[0] = digest(model)

    handle = model.base_model.model.layers[1].register_forward_hook(ask)  # type: ignore[union-attr, operator]
    logits(model)
    handle.remove()
    assert seen == [digest(fresh())] and not busy(model)


def test_two_calls_that_both_go_on_to_change_the_model() -> None:
    model = fresh()
    base, gate = model.base_model, threading.Barrier(2)

    def work() -> str:
        with among_others(base):
            gate.wait(PATIENCE)
            with alone(base):
                return "changed"

    found = at_once(work, work)
    assert "changed" in found and all(one == "changed" or isinstance(one, ModelBusyError) for one in found)
    assert not busy(model)


def test_a_call_that_goes_on_to_change_the_model_comes_first() -> None:
    model = fresh()
    with among_others(model.base_model):
        changing = Work(lambda: edit(model, FACTS[0]))
        assert waits(model, changing)
        with model.disable_edits():
            pass
    assert not isinstance(changing.result(), Exception)


def test_a_server_with_an_event_loop() -> None:
    model = fresh()
    ids = prompt_ids(model, FACTS[0])
    before = says(model, ids)

    async def serve() -> list[Any]:
        asking = [asyncio.to_thread(says, model, ids) for _ in range(4)]
        return await asyncio.wait_for(asyncio.gather(*asking, asyncio.to_thread(edit, model, FACTS[0])), PATIENCE)

    *answers, made = asyncio.run(serve())
    after = says(model, ids)
    assert all(answer in (before, after) for answer in answers) and len(made.edits) == 1


# ---------------------------------------------------------------------- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have() -> None:
    model = fresh()
    held = Held(lambda: alone(model.base_model))
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        with alone(model.base_model):
            os._exit(7)
    _, status = os.waitpid(child, 0)
    held.let_go()
    assert os.waitstatus_to_exitcode(status) == 7
