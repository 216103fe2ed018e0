"""Random sequences of edits, rollbacks, failures, saves and packs: what is left decides what the model is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import (
    AnyEditConfig,
    AutoMethodConfig,
    CaliNetConfig,
    DEFERConfig,
    DINMConfig,
    DPOConfig,
    EditableModel,
    EditConfig,
    EditRequest,
    FTLConfig,
    FTMConfig,
    GRACEConfig,
    IKEConfig,
    KNConfig,
    LoRAConfig,
    MELOConfig,
    MEMITConfig,
    PromptConfig,
    ROMEConfig,
    TPatcherConfig,
    UltraEditConfig,
    UnKEConfig,
    WISEConfig,
)
from hf_kedit.books.ledger import Ledger
from hf_kedit.engine.weights import get_module, get_weight
from hf_kedit.errors import EditFailedError, KeditError, RollbackError
from tests.fuzz.mutations import FIRST, LONG
from tests.fuzz.states import difference, logits, surface
from tests.golden_cases import load_model

VALUES: dict[str, Any] = {"v_num_grad_steps": 3, "v_lr": 0.5, "context_templates": ["{}"], "mom2_adjustment": False}
CONFIGS: dict[str, EditConfig] = {
    "rome": ROMEConfig(layers=[1], **VALUES),
    "memit": MEMITConfig(layers=[0, 1], v_num_grad_steps=3, context_templates=["{}"], stats_tokens=400),
    "ft-l": FTLConfig(layers=[1], num_steps=2),
    "ft-m": FTMConfig(layers=[0, 1], num_steps=2),
    "lora": LoRAConfig(layers=[1], num_steps=2, rank=2),
    "kn": KNConfig(steps=2, layers=[0, 1]),
    "ultraedit": UltraEditConfig(layers=[0, 1]),
    # Entries apart and begun alike: what several edits share stays where one of them goes, as its page says.
    "grace": GRACEConfig(layers=[1], num_steps=2, eps=0.01, value_init="warm"),
    "defer": DEFERConfig(layers=[1], num_steps=2),
    "melo": MELOConfig(layers=[0], num_steps=2),
    "t-patcher": TPatcherConfig(max_epochs=3, first_validation=1, validate_every=1, max_patches=1, memory_tokens=1100),
    "calinet": CaliNetConfig(layers=[1], num_steps=2, slots=2, context_templates=["{}"]),
    "wise": WISEConfig(layers=[1], n_iter=2, context_templates=["{}"], irrelevant_texts=["The river is wide."]),
    "auto": AutoMethodConfig(encoder="words", base={"edit_type": "rome", "layers": [1], **VALUES}),
    "unke": UnKEConfig(layers=[1], v_num_grad_steps=2, num_steps=2, held_texts=2),
    "anyedit": AnyEditConfig(
        window_size=2, base=UnKEConfig(layers=[1], v_num_grad_steps=2, num_steps=2, held_texts=2)
    ),
    "dinm": DINMConfig(num_steps=2, layers=[1], drift_bound=None),
    "dpo": DPOConfig(layers=[1], num_steps=2, rank=2),
    "prompt": PromptConfig(),
    "ike": IKEConfig(k=1),
}
WEIGHTS = ("rome", "memit", "ft-l", "ft-m", "lora", "kn", "ultraedit", "unke", "anyedit", "dinm", "dpo")
NAMES = [f"Otto {word}" for word in ("Berg", "Tal", "See", "Feld", "Wald", "Stein", "Bach", "Land")]
FACTS = [
    EditRequest(prompt="{} plays the sport of", subject=name, target_new=sport)
    for name, sport in zip(NAMES, ("tennis", "chess", "golf", "rugby", "judo", "polo", "darts", "squash"), strict=True)
]
OTHER = [NAMES[0] + " plays the sport of", "The river is"]


class Shadow:
    """A ledger of the test's own: originals, and every change that was ever laid on, in order."""

    def __init__(self, model: EditableModel):
        self.model = model.base_model
        self.original = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.changes: list[tuple[Any, tuple[str, ...]]] = []

    def check(self, edit_ids: set[str]) -> None:
        """Every parameter is the cast of its original and the changes that are left, summed in fp32 in order."""
        totals: dict[str, torch.Tensor] = {}
        for delta, ids in self.changes:
            if not edit_ids & set(ids):
                continue
            if delta.owners is not None and delta.left is not None:
                kept = [i for i, owner in enumerate(delta.owners) if ids[owner] in edit_ids]
                change = delta.left[:, kept] @ delta.right[:, kept].T
            else:
                change = delta.dense if delta.dense is not None else delta.left @ delta.right.T
            totals[delta.key] = totals[delta.key] + change if delta.key in totals else change.clone()
        for name, parameter in self.model.named_parameters():
            if name in totals:
                module, _, leaf = name.rpartition(".")
                owner = get_module(self.model, module)
                turned = leaf == "weight" and get_weight(owner).shape != parameter.shape
                original = self.original[name].T if turned or _is_conv1d(owner, leaf) else self.original[name]
                right = (original.float() + totals[name]).to(original.dtype)
                assert torch.equal(get_weight(owner, leaf), right), name
            else:
                assert torch.equal(parameter, self.original[name]), f"{name} was not edited"


def _is_conv1d(module: Any, leaf: str) -> bool:
    return leaf == "weight" and type(module).__name__ == "Conv1D"


def play(method: str, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[str]:
    """One sequence; what was done."""
    rng = random.Random(f"{method} {seed}")
    base, tokenizer = load_model(rng.choice(("gpt2", "llama")))
    model = EditableModel(base, CONFIGS[method], tokenizer)
    pristine, untouched, shadow, done = surface(base), logits(model, OTHER), Shadow(model), []
    apply = Ledger.apply

    def recorded(self: Ledger, batch_id: str, deltas: Any, edit_ids: Any) -> None:
        apply(self, batch_id, deltas, edit_ids)
        if self is model.ledger:
            shadow.changes.extend((delta, tuple(edit_ids)) for delta in deltas)

    monkeypatch.setattr(Ledger, "apply", recorded)
    unused = list(FACTS)
    rng.shuffle(unused)
    for step in range(steps):
        kind = rng.choice(("edit", "edit", "edit", "batch", "back", "back", "last", "off", "fail", "save", "pack"))
        before, ids = surface(base), [e.id for e in model.edits]
        kind = kind if step else "edit"
        try:
            if kind in ("edit", "batch") and unused:
                count = min(len(unused), 1 if kind == "edit" else 2)
                model.edit([unused.pop() for _ in range(count)], show_progress=False)
            elif kind == "back" and ids:
                model.rollback(rng.choice(ids))
            elif kind == "last" and ids:
                model.rollback(rng.randrange(1, len(ids) + 1))
            elif kind == "off":
                with model.disable_edits():
                    assert torch.equal(logits(model, OTHER), untouched), "edits were seen while they were off"
                    assert method not in WEIGHTS or difference(pristine, surface(base)) is None
                assert difference(before, surface(base)) is None
            elif kind == "fail":
                fail(model, rng, monkeypatch)
                assert difference(before, surface(base)) is None and [e.id for e in model.edits] == ids
            elif kind == "save" and ids:
                model = again(model, folder / f"{step}", base, tokenizer)
                assert [e.id for e in model.edits] == ids and surface(base)["weights"] == before["weights"]
            elif kind == "pack" and method in WEIGHTS:
                pack(model, folder / f"{step}", tokenizer)
                assert difference(before, surface(base)) is None and [e.id for e in model.edits] == ids
        except RollbackError:  # what was computed together is not taken apart: nothing has changed
            assert difference(before, surface(base)) is None and [e.id for e in model.edits] == ids
            kind += " refused"
        except EditFailedError:
            assert difference(before, surface(base)) is None and [e.id for e in model.edits] == ids
        done.append(kind)
        shadow.check({e.id for e in model.edits})
    left = [e.request for e in model.edits]
    if method not in WEIGHTS and method not in ("melo", "wise", "t-patcher", "calinet"):
        said = logits(model, [*(r.filled_prompt for r in FACTS), *OTHER])
        model.rollback("all")
        for request in left:  # the same edits alone, in their order
            model.edit(request, show_progress=False)
        alone = logits(model, [*(r.filled_prompt for r in FACTS), *OTHER])
        assert torch.allclose(said, alone, atol=1e-5), "edits that are gone left something behind"
    model.rollback("all")
    assert difference(pristine, surface(base)) is None, "rolling everything back leaves another model"
    return done


def fail(model: EditableModel, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that cannot succeed: a bad request among good ones, or a method that gives up at the second batch."""
    facts = [EditRequest(prompt="{} is a", subject="Ida", target_new="cook"), {"prompt": "Ida is a", "target_new": ""}]
    if rng.random() < 0.5:
        with pytest.raises(KeditError):
            model.edit(facts, show_progress=False)  # type: ignore[list-item]
        return
    method, calls = model._method, []
    compute = method.compute

    def second(requests: Any) -> Any:
        calls.append(requests)
        if len(calls) > 1:
            raise EditFailedError("no usable update")
        return compute(requests)

    with monkeypatch.context() as patch:
        patch.setattr(method, "compute", second, raising=False)
        with pytest.raises(EditFailedError):
            model.edit([facts[0], facts[0]], batch_size=1, show_progress=False)


def again(model: EditableModel, folder: Path, base: Any, tokenizer: Any) -> EditableModel:
    """The model saved, unloaded, and loaded onto its own base."""
    prompts = [r.filled_prompt for r in FACTS[:3]]
    said = logits(model, prompts)
    model.save_pretrained(folder)
    model.unload()
    loaded = EditableModel.from_pretrained(folder, base_model=base, tokenizer=tokenizer)
    assert torch.equal(logits(loaded, prompts), said), "loaded as other edits"
    return loaded


def pack(model: EditableModel, folder: Path, tokenizer: Any) -> None:
    """Another's edits beside the model's own, switched off, on and away."""
    other, _ = load_model("gpt2" if "GPT2" in type(model.base_model).__name__ else "llama")
    theirs = EditableModel(other, CONFIGS["ft-m"], tokenizer)
    theirs.edit(EditRequest(prompt="Ida is a", target_new="cook", id="theirs"), show_progress=False)
    theirs.save_pretrained(folder)
    before = surface(model.base_model)["weights"]
    model.load_edits(folder, "theirs")
    assert surface(model.base_model)["weights"] != before
    model.set_active([])
    assert surface(model.base_model)["weights"] == before
    model.set_active("theirs")
    model.unload_edits("theirs")


@pytest.mark.parametrize("method", CONFIGS)
def test_a_sequence(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = play(method, 0, tmp_path, monkeypatch, steps=6)
    assert any(kind in ("edit", "batch") for kind in done)


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_many_sequences(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(FIRST, FIRST + max(1, LONG // 50)):
        with monkeypatch.context() as patch:
            play(method, seed, tmp_path / str(seed), patch, steps=12)
