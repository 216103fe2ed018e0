"""What MALMEN and KE do beyond the recorded numbers: groups, chunks, texts of changes, training through Trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hf_kedit import (
    EditableModel,
    EditRequest,
    EditTrainer,
    EditTrainingArguments,
    evaluate_edits,
    load_edit_dataset,
    load_requests,
)
from hf_kedit.editors.editor import Editor, editor_class
from hf_kedit.engine.gradients import low_rank_paths
from hf_kedit.engine.supervised import IGNORE, logits_where
from hf_kedit.engine.weights import get_module
from hf_kedit.errors import ConfigError, EditFailedError
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.ke import KEConfig, KEEditor, present_answer
from hf_kedit.methods.malmen import MALMENConfig, MALMENEditor
from hf_kedit.methods.mend import MENDConfig
from hf_kedit.methods.rledit import RLEditConfig
from hf_kedit.training import EditCollator, EditFacts

FACTS = load_edit_dataset("world", split="train", limit=12)
SMALL: dict[str, Any] = {
    "malmen": MALMENConfig(layers=[5], rank=4, edit_lr=1e-3, micro_batch=2, rows=5),
    "ke": KEConfig(layers=[5], lstm_size=8, condition_size=8, hidden_size=8),
    "rledit": RLEditConfig(layers=[5], rank=4, num_blocks=1, edit_lr=1e-3, micro_batch=2, rows=5, turns=2),
}


def train(method: str, folder: Path, **arguments: Any) -> EditTrainer:
    editor = editor_class(method).for_model(load_base("kedit/world-gpt2"), SMALL[method])
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True}
    args = EditTrainingArguments(output_dir=str(folder), use_cpu=True, logging_steps=1, **{**settings, **arguments})
    trainer = EditTrainer(editor, args, FACTS, processing_class=load_tokenizer("kedit/world-gpt2"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["malmen", "ke", "rledit"])
def test_trains_saves_and_edits(method: str, tmp_path: Path) -> None:
    together = {} if method == "ke" else {"edits_per_group": 4, "save_strategy": "no"}
    trainer = train(method, tmp_path, learning_rate=1e-3, **together)
    assert all(p.grad is None for p in trainer.model.base.parameters())
    trainer.save_model()
    saved = Editor.from_pretrained(tmp_path)
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in trainer.model.state_dict().items())
    config = type(SMALL[method])(editor=str(tmp_path))
    model = EditableModel.from_pretrained("kedit/world-gpt2", config)
    before = {n: p.detach().clone() for n, p in model.base_model.named_parameters()}
    result = model.edit(FACTS.select(range(3)))
    touched = {n for n, p in model.base_model.named_parameters() if not torch.equal(p, before[n])}
    assert touched == {"transformer.h.5.mlp.c_fc.weight", "transformer.h.5.mlp.c_proj.weight"}
    model.rollback(result.ids[0])
    model.rollback("all")
    assert all(torch.equal(p, before[n]) for n, p in model.base_model.named_parameters())


def test_malmen_wants_one_group_a_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edits_per_group"):
        train("malmen", tmp_path)


def test_malmen_groups_do_not_see_each_other() -> None:
    base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
    editor = MALMENEditor.for_model(base, SMALL["malmen"])
    base.requires_grad_(False)
    requests = [EditRequest(prompt=f["prompt"], target_new=f["target_new"]) for f in FACTS]
    editor.train().observe(base, editor.edit_batch(base, tokenizer, requests))
    editor.eval()
    groups = torch.tensor([0, 0, 1, 1])
    both = editor.propose(base, editor.edit_batch(base, tokenizer, requests[:4]), groups)
    alone = editor.propose(base, editor.edit_batch(base, tokenizer, requests[2:4]), groups[2:])
    for module, change in both.items():
        mine = change.owners >= 2
        assert torch.allclose(change.left[:, mine], alone[module].left, atol=1e-5)
        assert torch.equal(change.owners[mine] - 2, alone[module].owners)


def test_ke_reads_what_the_model_says_now() -> None:
    base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
    editor = KEEditor.for_model(base, SMALL["ke"])
    assert torch.equal(editor.condition.embedding.weight, base.get_input_embeddings().weight)
    fact = FACTS[0]
    bare = EditRequest(prompt=fact["prompt"], target_new=fact["ground_truth"][0])
    assert present_answer(base, tokenizer, bare).startswith(fact["ground_truth"][0])
    full = EditRequest(prompt=fact["prompt"], target_new="Rovi", ground_truth=["Tann"])
    batch = editor.edit_batch(base, tokenizer, [full])
    wanted = tokenizer(f"Tann >> Rovi || {fact['prompt']}", add_special_tokens=False)["input_ids"]
    assert batch["condition_ids"].tolist() == [wanted]


# ---------------------------------------------------------------------- KE under its constraint


def constrained() -> tuple[KEEditor, dict[str, Any]]:
    editor = KEEditor.for_model(load_base("kedit/world-gpt2"), dataclasses.replace(SMALL["ke"], margin=0.02)).train()
    facts = EditFacts(FACTS)
    return editor, EditCollator(editor, load_tokenizer("kedit/world-gpt2"))([facts[i] for i in range(3)])


def test_ke_constrained_loss_and_its_gradients() -> None:
    editor, batch = constrained()
    with torch.no_grad():
        editor.multiplier.fill_(1.5)
    output = editor(**batch)
    assert output.loss.item() == pytest.approx(float(output.edit_loss + 1.5 * (output.locality_loss - 0.02)), rel=1e-5)
    with (
        torch.no_grad(),
        low_rank_paths(editor.base, editor.propose(editor.base, batch["edit"], batch["groups"]), batch["groups"]),
    ):
        losses = []
        for part in (batch["edit"], batch["rephrase"]):
            labelled = part["labels"] != IGNORE
            logits = logits_where(editor.base, part, labelled)
            nll = torch.nn.functional.cross_entropy(
                logits, part["labels"][labelled], reduction="none", label_smoothing=0.1
            )
            rows = labelled.nonzero()[:, 0]
            losses.append(torch.stack([nll[rows == i].mean() for i in range(3)]).mean())
    assert float(output.edit_loss) == pytest.approx(float(sum(losses) / 2), rel=1e-5)
    output.loss.backward()
    # descent on this gradient raises the multiplier while the divergence exceeds the margin
    assert editor.multiplier.grad.item() == pytest.approx(0.02 - float(output.locality_loss), rel=1e-5)
    once = {n: p.grad.clone() for n, p in editor.named_parameters()}
    assert all(torch.isfinite(g).all() for g in once.values())
    editor.zero_grad()
    (editor(**batch).loss / 4).backward()  # as with four accumulated batches
    assert all(torch.allclose(p.grad * 4, once[n], rtol=1e-4, atol=1e-7) for n, p in editor.named_parameters())


def test_ke_multiplier_and_margin_move_with_training(tmp_path: Path) -> None:
    trainer = train("ke", tmp_path / "a", max_steps=1, learning_rate=1e-4)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == [1e-4, 0.1]
    editor = trainer.model
    moved = editor.multiplier.item() - 1
    assert abs(moved) == pytest.approx(0.1, rel=0.01)  # Adam's first step
    with torch.no_grad():
        editor.multiplier.fill_(-0.3)
    editor.after_step()
    assert editor.multiplier.item() == 0
    editor.after_evaluation({"edit_success": 0.9})
    assert float(editor.margin) == pytest.approx(1e-3)
    for wanted in (8e-4, 6.4e-4):
        editor.after_evaluation({"edit_success": 0.95})
        assert float(editor.margin) == pytest.approx(wanted)
    for _ in range(30):
        editor.after_evaluation({"edit_success": 1.0})
    assert float(editor.margin) == pytest.approx(1e-5)
    editor.save_pretrained(tmp_path / "b")
    assert torch.equal(Editor.from_pretrained(tmp_path / "b").margin, editor.margin)


def test_ke_margin_shrinks_after_an_evaluation_in_training(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL["ke"], margin_success=0.0)
    editor = KEEditor.for_model(load_base("kedit/world-gpt2"), config)
    known = [EditRequest(prompt=f["prompt"], target_new=f["ground_truth"][0], locality=_probes(f)) for f in FACTS]
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "report_to": []}
    args = EditTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **settings)
    tokenizer = load_tokenizer("kedit/world-gpt2")
    trainer = EditTrainer(editor, args, known, known[:2], processing_class=tokenizer)
    trainer.train()
    assert float(editor.margin) == pytest.approx(1e-3 * 0.8**2)
    trainer.evaluate()
    assert float(editor.margin) == pytest.approx(1e-3 * 0.8**2)  # not in training


def _probes(fact: Any) -> Any:
    return load_requests(fact)[0].locality


# ---------------------------------------------------------------------- guard rail


def test_a_change_out_of_proportion_is_reported_or_refused(tmp_path: Path, caplog: Any) -> None:
    editor = Editor.from_pretrained("kedit/mend-world-gpt2")
    usual = editor.origin["trained_change_size"]
    assert editor.origin["trained_edits_together"] == 10 and set(usual) == set(editor.shapes)
    editor.origin["trained_change_size"] = {m: v / 100 for m, v in usual.items()}
    editor.save_pretrained(tmp_path)
    model = EditableModel.from_pretrained("kedit/world-gpt2", MENDConfig(editor=str(tmp_path), max_relative_size=4))
    before = {n: p.detach().clone() for n, p in model.base_model.named_parameters()}
    with pytest.raises(EditFailedError, match="times as large as in training"):
        model.edit(FACTS.select(range(10)))
    assert not model.edits and all(torch.equal(p, before[n]) for n, p in model.base_model.named_parameters())
    model = EditableModel.from_pretrained("kedit/world-gpt2", MENDConfig(editor=str(tmp_path)))
    with caplog.at_level("WARNING", logger="hf_kedit"):
        model.edit(FACTS.select(range(10)))
    assert "times as large as in training" in caplog.text and len(model.edits) == 10
    caplog.clear()
    usual_model = EditableModel.from_pretrained("kedit/world-gpt2", MENDConfig(max_relative_size=4))
    result = usual_model.edit(FACTS.select(range(10)))
    assert 0.2 < result.edits[0].diagnostics["relative_size"] < 3 and "in training" not in caplog.text


# ---------------------------------------------------------------------- the packaged editors


@pytest.mark.parametrize("model", ["world-gpt2", "world-llama"])
@pytest.mark.parametrize(
    ("method", "setting", "facts", "together"),
    [
        ("ke", "single", 20, 1),
        ("mend", "batch", 20, 10),
        ("malmen", "batch", 50, 50),
        ("rledit", "sequential", 20, 10),
    ],
)
def test_packaged_editors_in_the_setting_that_they_are_for(
    model: str, method: str, setting: Any, facts: int, together: int
) -> None:
    """Held-out facts are said, in other words too, and most of the rest stays."""
    editable = EditableModel.from_pretrained(f"kedit/{model}", method)
    test = load_edit_dataset("world", split="test", limit=facts)
    said = evaluate_edits(editable, test, setting=setting, batch_size=together).summary()["post"]
    assert said["rewrite_acc"] >= 0.8 and said["rephrase_acc"] >= 0.75 and said["locality"] >= 0.85


@pytest.mark.parametrize("model", ["world-gpt2", "world-llama"])
@pytest.mark.parametrize("method", ["ke", "mend", "malmen", "rledit"])
def test_an_edit_is_the_same_beside_the_weights_in_them_and_as_an_adapter(
    model: str, method: str, tmp_path: Path
) -> None:
    """The low-rank paths of training, dense W + ΔW, the ledger's weights, and the exported adapter in PEFT."""
    base, tokenizer = load_base(f"kedit/{model}"), load_tokenizer(f"kedit/{model}")
    requests = load_requests(load_edit_dataset("world", split="test", limit=1).remove_columns("id"))
    editor = Editor.from_pretrained(f"kedit/{method}-{model}")
    changes = editor.propose(base, editor.edit_batch(base, tokenizer, requests), torch.zeros(1, dtype=torch.long))
    ids = tokenizer([requests[0].filled_prompt], return_tensors="pt")["input_ids"]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    untouched = logits(base)
    with torch.no_grad(), low_rank_paths(base, changes):
        beside = logits(base)
    dense = {}
    for name, change in changes.items():
        module, update = get_module(base, name), (change.left @ change.right.T).detach()
        dense[f"{name}.weight"] = module.weight + (update if isinstance(module, torch.nn.Linear) else update.T)
    with torch.no_grad():
        functional = torch.func.functional_call(base, dense, (ids,)).logits
    editable = EditableModel.from_pretrained(f"kedit/{model}", method)
    editable.edit(requests)
    editable.export_lora(tmp_path / "lora")
    adapter = PeftModel.from_pretrained(load_base(f"kedit/{model}"), tmp_path / "lora")
    scale = float(untouched.abs().max())
    assert float((beside - untouched).abs().max()) > 0.05 * scale
    for found in (functional, logits(editable), logits(adapter)):
        assert torch.allclose(found, beside, atol=1e-4 * scale)


@pytest.mark.parametrize("method", ["mend", "malmen", "ke", "rledit"])
def test_a_step_does_not_depend_on_how_many_facts_run_at_once(method: str) -> None:
    """Losses and gradients of four facts, one at a time and all at once: averaged, not summed.

    Facts that are edited together are averaged over their tokens, whatever fact these belong to: there it holds for
    facts of one length.
    """
    together = method in ("malmen", "rledit")
    config = {"mend": MENDConfig(layers=[5], rank=4)}.get(method) or SMALL[method]
    found = []
    for size in (1, 4):
        base, tokenizer = load_base("kedit/world-gpt2"), load_tokenizer("kedit/world-gpt2")
        torch.manual_seed(0)
        editor = editor_class(method).for_model(base, dataclasses.replace(config, micro_batch=size)).train()
        facts = EditFacts(FACTS)
        chosen = [facts[0 if together else i] for i in range(4)]
        output = editor(**EditCollator(editor, tokenizer, 4 if together else 1)(chosen))
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in editor.named_parameters() if p.grad is not None}
        losses = [float(x.detach()) for x in (output.loss, output.edit_loss, output.locality_loss)]
        found.append((losses, gradients))
    (losses, gradients), (expected, expected_gradients) = found
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert gradients.keys() == expected_gradients.keys() and gradients
    scale = max(float(g.norm()) for g in expected_gradients.values())
    assert scale > 0
    for name, gradient in expected_gradients.items():
        slack = (1e-3 if together else 1e-5) * scale  # equal facts make MALMEN's system nearly singular
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + slack, name


def test_the_card_shows_texts_as_texts_and_no_folder() -> None:
    from markdown_it import MarkdownIt

    from hf_kedit.editors.files import pack_editor

    nasty = "<script>x</script>`\r# Heading\n![i](http://x/y.png) \x1b[31m\n```\n"
    for base, shown in (
        (f"/home/someone/models/{nasty}", "y.png"),
        (f"org/{nasty}", "org/"),
        ("/home/me/tiny/", "tiny"),
    ):
        origin = {"base_model_name_or_path": base}
        files = pack_editor({"edit_type": "mend"}, {nasty: [2, 3]}, False, origin, {})
        text = files["README.md"].decode()
        page = MarkdownIt("commonmark").parse(text.rpartition("\n---\n")[2])
        titles = [page[i + 1].content for i, token in enumerate(page) if token.type == "heading_open"]
        assert len(titles) == 1 and shown in titles[0] and "/home" not in text
        parts = [part for token in page for part in [token, *(token.children or ())]]
        assert not [p for p in parts if p.type in ("html_inline", "html_block", "image", "link_open")]
        assert sum(token.type == "fence" for token in page) == 1 and "\x1b" not in text
