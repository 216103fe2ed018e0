"""T-Patcher and CaliNet on models that know facts: edits, neighbours, batches, generation, undoing, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kedit import EditableModel
from hf_kedit.config import EditConfig
from hf_kedit.data import load_edit_dataset
from hf_kedit.engine.neurons import NeuronGroup, joined, neuron_output, pack_groups, unpack_groups, without
from hf_kedit.errors import ConfigError, RollbackError
from hf_kedit.methods import t_patcher
from hf_kedit.methods.calinet import CaliNetConfig
from hf_kedit.methods.t_patcher import TPatcherConfig
from hf_kedit.requests import load_requests

REQUESTS = load_requests(load_edit_dataset("world", split="test").select(range(4)))
T_PATCHER = TPatcherConfig(memory_tokens=1500, memory_top=100, max_epochs=150)
CALINET = CaliNetConfig(slots=16, lr=5e-3, num_steps=60, context_templates=["{}"])
BOTH = pytest.mark.parametrize(
    ("name", "config"), [("world-gpt2", T_PATCHER), ("world-llama", CALINET)], ids=["t-patcher", "calinet"]
)


def edited(name: str, config: EditConfig, count: int = 1) -> EditableModel:
    model = EditableModel.from_pretrained(f"kedit/{name}", config)
    for request in REQUESTS[:count]:
        model.edit(request, show_progress=False)
    return model


def logits(model: EditableModel, texts: list[str]) -> torch.Tensor:
    """Logits at the last token of left-padded texts."""
    assert model.tokenizer is not None
    rows = [model.tokenizer(t)["input_ids"] for t in texts]
    width = max(len(r) for r in rows)
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]


def says(model: EditableModel, prompt: str, cache: bool = True) -> str:
    assert model.tokenizer is not None
    batch = model.tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cache)
    return str(model.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :])).strip()


@BOTH
def test_a_life(name: str, config: EditConfig, tmp_path: Path) -> None:
    """Edit, say it, leave others alone, any batch, save and load, undo one, undo all."""
    texts = [r.filled_prompt for r in REQUESTS]
    base = EditableModel.from_pretrained(f"kedit/{name}", config)
    start, old = logits(base, texts), [says(base, t) for t in texts]
    model = edited(name, config, 2)
    for request, before in zip(REQUESTS[:2], old, strict=False):
        assert says(model, request.filled_prompt).startswith(request.target_new) != before.startswith(
            request.target_new
        )
        assert says(model, request.filled_prompt) == says(model, request.filled_prompt, cache=False)
    together = logits(model, texts)
    for i, text in enumerate(texts):
        assert torch.allclose(together[i], logits(model, [text])[0], atol=2e-4)
    with model.disable_edits():
        assert torch.equal(logits(model, texts), start)
    model.save_pretrained(tmp_path / "edits")
    assert torch.equal(logits(EditableModel.from_pretrained(tmp_path / "edits"), texts), together)
    model.rollback(1)
    assert torch.equal(logits(model, texts), logits(edited(name, config, 1), texts)), "the first edit as if alone"
    model.rollback("all")
    assert torch.equal(logits(model, texts), start) and not model.sites.memories


def test_t_patcher_spends_a_neuron_per_wrong_token() -> None:
    model = edited("world-gpt2", T_PATCHER)
    (site,) = model.sites.memories.values()
    (group,) = next(iter(site.groups.values()))  # type: ignore[attr-defined]
    assert group.count == model.edits[0].diagnostics["patches"] >= 1
    again = model.edit(REQUESTS[0].with_id("again"), show_progress=False).edits[0]
    assert again.diagnostics["patches"] == 0, "the model says it already"
    model.rollback("again")
    assert [e.id for e in model.edits] == site.edit_ids


def test_calinet_batches_go_as_a_whole() -> None:
    model = EditableModel.from_pretrained("kedit/world-llama", CALINET)
    ids = model.edit(REQUESTS[:3], show_progress=False).ids
    (site,) = model.sites.memories.values()
    (group,) = next(iter(site.groups.values()))  # type: ignore[attr-defined]
    assert group.count == 16 and group.gates is not None and group.edit_ids == tuple(ids)
    assert all(e.diagnostics["target_probability_after"] > 0.5 for e in model.edits)
    with pytest.raises(RollbackError, match="rebuild_without"):
        model.rollback(ids[0])
    again = model.rebuild_without(ids[0], show_progress=False)
    assert [e.id for e in again] == ids[1:] and len({e.batch_id for e in again}) == 1


def test_an_untrained_side_layer_changes_nothing() -> None:
    method = EditableModel.from_pretrained("kedit/world-gpt2", CALINET)._method
    for group in method._start(0).values():  # type: ignore[attr-defined]
        x = torch.randn(3, group.keys.shape[1])
        assert torch.equal(neuron_output(x, group, torch.relu), torch.zeros_like(x))


def test_groups_of_neurons() -> None:
    groups = [
        NeuronGroup((f"e{i}",), torch.randn(i + 1, 4), torch.randn(i + 1, 4), torch.randn(i + 1)) for i in range(3)
    ]
    tensors, entries = pack_groups(groups)
    back = unpack_groups(tensors, entries)
    assert [g.edit_ids for g in back] == [g.edit_ids for g in groups]
    assert all(torch.equal(a.values, b.values) for a, b in zip(back, groups, strict=True))
    x = torch.randn(2, 4)
    apart = sum(neuron_output(x, g, torch.relu) for g in groups)
    assert torch.allclose(neuron_output(x, joined(groups), torch.relu), torch.as_tensor(apart), atol=1e-5)
    assert [g.edit_ids for g in without(groups, {"e1"}, "X")] == [("e0",), ("e2",)]
    with pytest.raises(RollbackError):
        without([NeuronGroup(("a", "b"), torch.zeros(1, 4), torch.zeros(1, 4))], {"a"}, "X")
    with pytest.raises(ValueError, match="not as many"):
        unpack_groups(tensors, entries[:2])


def test_bad_settings_are_refused() -> None:
    for values in ({"layers": [1, 2]}, {"memory_tokens": 1}, {"lr": 0}, {"max_patches": 0}):
        with pytest.raises(ConfigError):
            TPatcherConfig(**values)  # type: ignore[arg-type]
    for values in ({"slots": 0}, {"lr": 0.0}, {"num_steps": 0}):
        with pytest.raises(ConfigError):
            CaliNetConfig(**values)  # type: ignore[arg-type]


def test_earlier_mistakes_are_among_the_memories_of_t_patcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new neuron is trained to stay silent where an earlier one speaks."""
    model = EditableModel.from_pretrained("kedit/world-gpt2", TPatcherConfig(memory_tokens=40, max_epochs=2))
    seen: list[torch.Tensor] = []
    real = t_patcher._Trained.activations

    def noting(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.detach().cpu())
        return real(self, inputs)

    monkeypatch.setattr(t_patcher._Trained, "activations", noting)
    model.edit(REQUESTS[0], show_progress=False)
    assert {len(inputs) for inputs in seen} <= {36, 4}, "the corpus alone: nine parts to train on, one to validate"
    (site,) = model.sites.memories.values()
    ((group,),) = site.groups.values()  # type: ignore[attr-defined]
    queries = group.queries.cpu()
    assert len(queries) >= 1
    seen.clear()
    model.edit(REQUESTS[1], show_progress=False)
    memories = torch.cat(seen)
    for query in queries:
        assert (memories == query).all(dim=1).any()
