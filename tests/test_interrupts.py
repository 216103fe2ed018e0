"""Ctrl-C at every step of what switches, writes and edits: the model is as before, or the change is complete."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.books.book import restore_all, snapshot_all
from hf_kedit.books.ledger import WeightDelta
from hf_kedit.books.prefixes import Prefix
from hf_kedit.books.prompting import Prompter
from hf_kedit.books.sites import Sites, prompt_lengths
from hf_kedit.config import config_class
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.journal import Journal
from hf_kedit.methods.lora import injected
from tests.golden_cases import load_model
from tests.interrupts import at_every_step, interrupted_at, steps_of
from tests.models import tiny_model

# An interrupt inside a generator expression is reported by Python when the generator is thrown away.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FACT = EditRequest(prompt="{} plays the sport of", subject="Mira Halvorsen", target_new="tennis", id="a")
OTHER = EditRequest(prompt="The mother tongue of {} is", subject="Tobias Renner", target_new="Italian", id="b")
FIELDS: dict[str, dict[str, Any]] = {
    "rome": {"v_num_grad_steps": 2, "mom2_adjustment": False, "context_templates": ["{}"]},
    "grace": {"num_steps": 2},
    "auto": {
        "encoder": "words",
        "base": {"edit_type": "rome", "v_num_grad_steps": 2, "mom2_adjustment": False, "context_templates": ["{}"]},
    },
    "prompt": {},
    "ft-m": {"num_steps": 2},
    "lora": {"num_steps": 1},
}


def made(method: str, *facts: EditRequest) -> EditableModel:
    _, tokenizer = load_model("llama")
    base = tiny_model("llama", vocab_size=max(len(tokenizer), 420), num_hidden_layers=2)
    model = EditableModel(base, config_class(method)(**FIELDS[method]), tokenizer)
    for fact in facts:
        model.edit(fact, show_progress=False)
    return model


def bits(model: torch.nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def state(model: EditableModel) -> list[Any]:
    """Everything that is set on a model or remembered of it."""
    base = model.base_model
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in base.named_modules()]
    instance = [name for name, m in base.named_modules() if "forward" in m.__dict__ or "generate" in m.__dict__]
    switched = (model.ledger._disabled, model.sites.sites._disabled, model.prompts.prompter._passing)
    held = [book.edit_ids for book in model.books.values()]
    journal = [edit.id for edit in model.edits]
    grads = [p.requires_grad for p in base.parameters()]
    kinds = [type(m).__name__ for m in base.modules()]
    return [bits(base), journal, held, hooks, instance, switched, grads, kinds, torch.is_grad_enabled()]


def unchanged(model: EditableModel) -> Callable[[int], None]:
    before = state(model)

    def check(step: int) -> None:
        assert state(model) == before, f"interrupted at step {step}"

    return check


@pytest.mark.parametrize("method", ["rome", "grace", "auto", "prompt"])
def test_switching_edits_off_and_on(method: str) -> None:
    model = made(method, FACT)
    pristine = bits(made(method).base_model)
    seen = set()

    def run() -> None:
        with model.disable_edits() as same:
            assert same is model
            with model.disable_edits():
                seen.add(bits(model.base_model))

    assert at_every_step(run, unchanged(model)) > 60
    assert seen == {pristine}


def test_every_single_book() -> None:
    model = made("rome", FACT)
    for book in model.books.values():

        def run(book: Any = book) -> None:
            with book.disabled():
                pass

        assert at_every_step(run, unchanged(model)) > 10


def test_provisional_deltas() -> None:
    model = made("rome", FACT)
    path = model.anatomy.down(1).path
    dense = torch.ones(model.ledger.original(path).shape)

    def run() -> None:
        with model.ledger.provisional() as scope:
            scope.add(WeightDelta(path, dense=dense))
            scope.add(WeightDelta(path, dense=dense))

    assert at_every_step(run, unchanged(model)) > 40


def test_sites_are_attached_or_not() -> None:
    model = tiny_model("llama")
    path = "model.layers.1.mlp"
    functions = {path: lambda call: None}

    def consistent(sites: Sites) -> None:
        module = model.get_submodule(path)
        wrapped = bool(sites.paths)
        assert (len(module._forward_hooks) == 1) == wrapped == bool(model._forward_pre_hooks)
        assert ("generate" in model.__dict__) == wrapped
        sites.detach("me")
        assert not module._forward_hooks and not model._forward_pre_hooks and "generate" not in model.__dict__

    def attach() -> None:
        sites.attach("me", functions)

    def detach() -> None:
        Sites.of(model).detach("me")

    def attempt() -> None:
        with sites.trying(functions):
            assert model.get_submodule(path)._forward_hooks

    for run in (attach, detach, attempt):
        number, more = 1, True
        while more:
            sites = Sites(model)
            if run is detach:
                sites.attach("me", functions)
            more = interrupted_at(number, run)
            if run is attempt:
                assert not sites._trial and sites._muted == set()
            consistent(sites)
            number += 1
        assert number > 15


def test_a_prompter_is_attached_or_not() -> None:
    model, tokenizer = load_model("llama")
    own = {name: model.__dict__.get(name) for name in ("forward", "generate")}
    for first in (False, True):
        number, more = 1, True
        while more:
            prompter = Prompter(model, lambda: tokenizer, lambda prompts: [Prefix("x")] * len(prompts))
            if first:
                prompter.attach()
            more = interrupted_at(number, prompter.detach if first else prompter.attach)
            attached = prompter._before is not None
            assert ("forward" in model.__dict__) == attached == ("generate" in model.__dict__)
            prompter.detach()
            assert {name: model.__dict__.get(name) for name in own} == own
            number += 1
        assert number > 8

    prompter = Prompter(model, lambda: tokenizer, lambda prompts: [None] * len(prompts))

    def run() -> None:
        with prompter.passing():
            assert prompter.is_passing

    assert at_every_step(run, lambda _: prompter._passing == 0 or pytest.fail("still passing")) > 8


def test_what_is_said_of_prompts_is_forgotten() -> None:
    from hf_kedit.books.sites import _PROMPTS

    model = tiny_model("llama")

    def run() -> None:
        with prompt_lengths(model, [3]):
            assert _PROMPTS.get()

    assert at_every_step(run, lambda _: _PROMPTS.get() == () or pytest.fail("still said")) > 8


def test_frozen_models_and_injected_layers() -> None:
    from peft import LoraConfig

    model = made("lora")
    model.base_model.train()
    path = "model.layers.1.mlp.down_proj"
    config = LoraConfig(r=1, target_modules=[path])

    def frozen() -> None:
        with frozen_eval(model.base_model):
            assert not model.base_model.training

    def around() -> None:
        with injected(model.base_model, config, [path]):
            assert hasattr(model.base_model.get_submodule(path), "lora_A")

    assert at_every_step(frozen, unchanged(model)) > 30
    model.base_model.requires_grad_(False)  # PEFT does, and it is called on frozen models only
    assert at_every_step(around, unchanged(model)) > 15


@pytest.mark.parametrize("method", ["rome", "grace", "auto", "prompt", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_edit_is_made_or_not(method: str) -> None:
    """At some steps of an edit beside another one, and at all of the last: where it is written and the call ends."""
    check_edits(method, few=20, last=30)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(FIELDS))
def test_an_edit_is_made_or_not_at_many_steps(method: str) -> None:
    check_edits(method, few=400, last=400)


def check_edits(method: str, few: int, last: int) -> None:
    model = made(method, FACT)
    before = state(model)
    done = model.edit(OTHER, show_progress=False)  # what is computed once is computed
    complete = state(model)
    model.rollback(done.ids)
    assert state(model) == before

    def run() -> None:
        model.edit(OTHER, show_progress=False)

    total = steps_of(run)
    model.rollback("b")
    chosen = random.Random(0).sample(range(1, total), few)
    outcomes = set()
    for number in [*chosen, *range(total - last, total + 1)]:
        interrupted_at(number, run)
        after = state(model)
        assert after in (before, complete), f"interrupted at step {number} of {total}"
        outcomes.add(after == complete)
        if after == complete:
            model.rollback("b")
        assert state(model) == before, f"undone after an interrupt at step {number}"
    assert False in outcomes


@pytest.mark.parametrize("method", ["rome", "grace", "auto", "prompt"])
def test_a_rollback_is_done_or_not(method: str) -> None:
    model = made(method, FACT, OTHER)
    before, books, journal = state(model), snapshot_all(model.books.values()), model.edits
    number, more = 1, True
    while more:
        more = interrupted_at(number, lambda: model.rollback("b"))
        if state(model) != before:
            assert [edit.id for edit in model.edits] == ["a"]
            assert all(ids in ([], ["a"]) for ids in (book.edit_ids for book in model.books.values()))
            restore_all(books)
            model.journal = Journal(journal)
            assert state(model) == before
        number += 1
    model.rollback("all")
    assert bits(model.base_model) == bits(made(method).base_model)
