"""RLEdit's turns against the same computed on models whose weights really carry the turns before."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditTrainingArguments, load_edit_dataset
from hf_kedit.engine.supervised import IGNORE, logits_where, score
from hf_kedit.engine.weights import get_module, get_weight, set_weight
from hf_kedit.errors import ConfigError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.malmen import MALMENConfig, MALMENEditor
from hf_kedit.methods.rledit import RLEditConfig, RLEditEditor
from hf_kedit.training import EditCollator, EditFacts

FACTS = EditFacts(load_edit_dataset("world", split="train", limit=9))
CONFIG = RLEditConfig(
    modules=["transformer.h.4.mlp.c_proj", "transformer.h.5.mlp.c_proj"],
    rank=4,
    num_blocks=1,
    edit_lr=0.02,
    micro_batch=2,
    rows=4,
    turns=4,
    discount=0.5,
    size_weight=0.01,
)


def turns(editor: RLEditEditor, count: int = 3) -> list[dict[str, Any]]:
    collate = EditCollator(editor, load_tokenizer("kedit/world-gpt2"), edits_per_group=3)
    return [collate([FACTS[i] for i in range(3 * t, 3 * t + 3)]) for t in range(count)]


def fresh(**changes: Any) -> RLEditEditor:
    """An editor whose statistics have seen all facts, as after some training."""
    editor = RLEditEditor.for_model(load_base("kedit/world-gpt2"), dataclasses.replace(CONFIG, **changes)).train()
    editor.base.requires_grad_(False)
    for turn in turns(editor):
        editor.observe(editor.base, turn["edit"])
    return editor


def merged(base: Any, changes: Any) -> Any:
    """A copy of the model with changes in its weights."""
    model = copy.deepcopy(base)
    for name, change in changes.items():
        module = get_module(model, name)
        set_weight(module, get_weight(module) + (change.left @ change.right.T).detach())
    return model


@torch.no_grad()
def expected_loss(editor: RLEditEditor, played: list[dict[str, Any]]) -> tuple[float, Any]:
    """L of the last turn, on weights that were really changed, and the changes of the turns."""
    config = editor.edit_config
    before, changes = editor.base, {}
    for turn in played:
        model = before if not changes else merged(before, changes)
        before = model
        rows = MALMENEditor.observe(editor, model, turn["edit"])
        changes = editor.solve(rows)
    after = merged(before, changes)
    reference = before if config.locality_of == "previous" else editor.base
    total = 0.0
    for age, turn in enumerate(reversed(played)):
        nll = score(after, turn["rephrase"]).nll
        where = turn["locality"]["labels"] != IGNORE
        old, new = (logits_where(m, turn["locality"], where).log_softmax(-1) for m in (reference, after))
        kl = (old.exp() * (old - new)).sum(-1)
        total += config.discount**age * float(nll.mean() + config.locality_weight * kl.mean())
    for change in changes.values():
        total += config.size_weight * float((change.left @ change.right.T).square().sum())
    return total, changes


@pytest.mark.parametrize("locality_of", ["previous", "original"])
def test_a_turn_sees_the_model_that_carries_the_turns_before(locality_of: str) -> None:
    editor = fresh(locality_of=locality_of, micro_batch=32)
    for net in editor.nets.values():
        net.norm.eval()  # both ways of computing it see the same statistics
    played = turns(editor)
    found = [editor(**turn).loss.item() for turn in played]
    for count in (1, 2, 3):
        assert found[count - 1] == pytest.approx(expected_loss(editor, played[:count])[0], rel=2e-3)
    assert editor.sequence.count == 3
    first = fresh(locality_of=locality_of, micro_batch=32)
    for net in first.nets.values():
        net.norm.eval()
    assert first(**played[2]).loss.item() != pytest.approx(found[2], rel=0.05)  # without the turns before


def test_the_gradient_is_that_of_the_loss() -> None:
    """Finite differences in the step sizes and in a bias, at the second turn."""
    editor = fresh(micro_batch=32)
    for net in editor.nets.values():
        net.norm.eval()
    played = turns(editor, 2)
    with torch.no_grad():
        for net in editor.nets.values():
            net.blocks[0].bias.fill_(0.1)  # away from the kink at 0, where training starts
    editor(**played[0])
    start = copy.deepcopy(editor._trained)
    editor.zero_grad()
    editor(**played[1]).loss.backward()
    net = next(iter(editor.nets.values()))
    for parameter, h in ((net.eta, 2e-4), (net.log_ridge, 0.05), (net.blocks[0].bias, 0.05)):
        direction = torch.sign(parameter.grad)
        wanted = float((parameter.grad * direction).sum())
        values = []
        for sign in (1, -1):
            editor._trained = copy.deepcopy(start)
            with torch.no_grad():
                parameter += sign * h * direction
                values.append(editor(**played[1]).loss.item())
                parameter -= sign * h * direction
        assert wanted > 0
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(wanted, rel=0.1)


def test_sequences_end_and_evaluation_has_its_own() -> None:
    editor = fresh(turns=2)
    played = turns(editor)
    editor(**played[0])
    editor.eval()
    with torch.no_grad():
        alone = editor(**played[1])
        assert editor.sequence.count == 1
        second = editor(**played[1])
        assert not torch.equal(second.edit_loss, alone.edit_loss)  # carries the turn before
        assert torch.equal(editor.eval()(**played[1]).edit_loss, alone.edit_loss)
    editor.train()
    assert editor.sequence.count == 1
    editor(**played[1])
    assert editor.sequence.count == 0


def test_what_is_carried_stays_short() -> None:
    editor = fresh(turns=100)
    played = turns(editor)
    total = torch.zeros(128, 512)
    sequence = editor.sequence
    for turn in played * 20:
        changes = editor.solve(editor.observe(editor.base, turn["edit"]))
        module = CONFIG.modules[0]
        total += changes[module].left @ changes[module].right.T
        sequence.play(changes, (turn["edit"], turn["rephrase"], turn["locality"]), 2)
    carried = sequence.carried[module]
    assert carried.left.shape[1] <= 128 and len(sequence.past) == 2
    assert torch.allclose(carried.left @ carried.right.T, total, atol=1e-4 * float(total.abs().max()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"edits_per_group": 2}, "edits_per_group"),
        ({"save_strategy": "epoch"}, "between sequences"),
        ({"save_strategy": "steps", "save_steps": 6}, "multiple of 4"),
    ],
)
def test_arguments_that_cannot_work(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    settings = {"edits_per_group": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    args = EditTrainingArguments(output_dir=str(tmp_path), **{**settings, **arguments})
    with pytest.raises(ConfigError, match=said):
        RLEditEditor.check_arguments(fresh(), args)
    fine = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    fresh().check_arguments(EditTrainingArguments(output_dir=str(tmp_path), **{**settings, **fine}))


def test_config() -> None:
    assert issubclass(RLEditConfig, MALMENConfig)
    with pytest.raises(ConfigError, match="discount"):
        RLEditConfig(discount=1.5)
