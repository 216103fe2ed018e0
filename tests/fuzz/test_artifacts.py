"""Damaged files of every kind that the library writes: refused with a typed error, or read as they were meant."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import AutoMethodConfig, EditableModel, EditRequest, ROMEConfig, embedded
from hf_kedit.artifact.lora_import import import_lora
from hf_kedit.editors.files import read_editor
from tests.fuzz.mutations import FIRST, LONG, Tally, attempt, damage_folder, damage_json, damage_tensors, dumps
from tests.fuzz.states import beside, contents, difference, logits, surface
from tests.golden_cases import load_model

OLD = Path(__file__).resolve().parent.parent / "artifact" / "data_0_1_0"
# `grace_gpt2_untied` changes the base for good (a head of its own) and is not among those that share a base.
SAVED = sorted(p.name for p in OLD.iterdir() if (p / "edit_config.json").is_file() and p.name != "grace_gpt2_untied")
NEW = ["auto_gpt2"]
"""Kinds of edits that 0.1.0 did not know; made here."""
OTHER = "An unrelated text about the river"


@cache
def base_of(name: str) -> tuple[Any, Any]:
    """A stock model that many cases share, and its tokenizer."""
    folder = str(embedded.path(f"kedit/world-{'llama' if 'llama' in name else 'gpt2'}"))
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    EditableModel(base, "rome", tokenizer)  # transformers hooks itself where somebody has asked for states once
    return base, tokenizer


def load(folder: Path, name: str) -> EditableModel:
    """The saved edits on the shared base."""
    base, tokenizer = base_of(name)
    return EditableModel.from_pretrained(folder, base_model=base, tokenizer=tokenizer)


def made_now(name: str) -> EditableModel:
    """Edits of a kind that is newer than the saved files; the method stands before the underscore."""
    base, tokenizer = base_of(name)
    values = {"v_num_grad_steps": 3, "context_templates": ["{}"], "mom2_adjustment": False}
    config = AutoMethodConfig(encoder="words", base={"edit_type": "rome", "layers": [1], **values})
    assert name.startswith(config.edit_type)
    model = EditableModel(base, config, tokenizer, base_model_id="kedit/world-gpt2")
    for subject, sport in (("Otto Berg", "tennis"), ("Anna Lind", "chess")):
        model.edit(prompt="{} plays the sport of", subject=subject, target_new=sport, show_progress=False)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str], torch.Tensor]]:
    """Artifact of the present format, prompts, and what the edited model says there, by name."""
    root = tmp_path_factory.mktemp("saved")

    @cache
    def make(name: str) -> tuple[Path, list[str], torch.Tensor]:
        model = load(OLD / name, name) if name in SAVED else made_now(name)
        model.save_pretrained(root / name)
        prompts = [*(e.request.filled_prompt for e in model.edits[:2]), OTHER]
        said = logits(model, prompts)
        model.unload()
        return root / name, prompts, said

    return make


def used(model: EditableModel, prompts: list[str], folder: Path) -> torch.Tensor:
    """Ask the edited model, let it write, and save its edits."""
    said = logits(model, prompts)
    model.generate(
        **model.tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=2, do_sample=False, pad_token_id=0
    )
    model.save_pretrained(folder)
    return said


def forge(folder: Path, rng: random.Random) -> str:
    """Damage one file and make the digests right again, as somebody would who means harm; says what was done."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".jsonl", ".json")))
    what = (damage_tensors if path.suffix == ".safetensors" else damage_json)(path, rng)
    config_file = folder / "edit_config.json"
    try:
        config = json.loads(config_file.read_bytes())
    except (ValueError, RecursionError):
        return what
    if isinstance(config, dict):
        config.pop("config_sha256", None)  # 0.1.0 wrote none, and what it wrote is read
        if isinstance(config.get("files"), dict):
            for name in config["files"]:
                if (folder / name).is_file():
                    config["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        config_file.write_bytes(dumps(config))
    return f"{path.name}: {what}"


def run(saved: Any, seeds: range, tmp_path: Path, forged: bool) -> Tally:
    tally = Tally()
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice([*SAVED, *NEW])
        source, prompts, said = saved(name)
        folder = tmp_path / "case" / "edits"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(source, folder)
        what = (forge if forged else damage_folder)(folder, rng)
        case = f"seed {seed}, {name}, {what}"
        base, _ = base_of(name)
        before, around = surface(base), contents(folder.parent)
        model = attempt(tally, case, lambda f=folder, n=name: load(f, n))
        if model is not None:
            tally.worked += 1
            refused = tally.refused
            now = attempt(tally, f"{case} (asked)", lambda m=model, p=prompts: used(m, p, tmp_path / "again"))
            if tally.refused > refused:
                tally.fail(case, "loaded, and cannot be used")
            if now is not None and not forged and not torch.equal(now, said):
                tally.fail(case, "loaded as other edits")
            if now is not None and forged and not torch.isfinite(now.float()).all():
                tally.fail(case, "loaded as edits that say NaN")
            attempt(tally, f"{case} (unloaded)", model.unload)
        changed = difference(before, surface(base))
        if changed:
            tally.fail(case, f"the base model is another: {changed}")
            base_of.cache_clear()
        if contents(folder.parent) != around:
            tally.fail(case, "reading wrote")
        if written := beside(tmp_path, "case", "again"):
            tally.fail(case, f"wrote beside the folders that it was given: {written}")
    return tally


def test_damaged_edits(saved: Any, tmp_path: Path) -> None:
    run(saved, range(40), tmp_path, forged=False).check(25)


def test_forged_edits(saved: Any, tmp_path: Path) -> None:
    run(saved, range(40), tmp_path, forged=True).check(20)


@pytest.mark.slow
@pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged"])
def test_many_damaged_edits(saved: Any, tmp_path: Path, forged: bool) -> None:
    run(saved, range(FIRST, FIRST + LONG), tmp_path, forged).check(LONG // 3)


# ---------------------------------------------------------------------- packs, editors, adapters of others


def others(seeds: range, tmp_path: Path) -> Tally:
    """Packs beside edits, trained editors, and LoRA adapters."""
    tally = Tally()
    tokenizer = base_of("gpt2")[1]
    for seed in seeds:
        rng = random.Random(seed)
        kind = rng.choice(("pack", "editor", "adapter"))
        source = {
            "pack": OLD / "rome_gpt2",
            "editor": embedded.editor("kedit/mend-world-gpt2") or OLD,
            "adapter": OLD / "exported_lora_llama",
        }[kind]
        folder = tmp_path / "case" / "files"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(source, folder)
        case = f"seed {seed}, {kind}, {damage_folder(folder, rng)}"
        if kind == "editor":
            if attempt(tally, case, lambda f=folder: read_editor(str(f))) is not None:
                tally.worked += 1
            continue
        base, tokenizer = base_of("llama" if kind == "adapter" else "gpt2")
        before, around = surface(base), contents(tmp_path)
        model = EditableModel(base, "rome", tokenizer)
        read = model.load_edits if kind == "pack" else lambda f, m=model: import_lora(m, f)
        if attempt(tally, case, lambda r=read, f=folder: r(str(f)) or True) is not None:
            tally.worked += 1
            now = attempt(tally, f"{case} (asked)", lambda m=model: logits(m, [OTHER]))
            if now is not None and not torch.isfinite(now).all():
                tally.fail(case, "loaded as edits that say NaN")
        elif model.edits or (changed := difference(before, surface(base))):
            tally.fail(case, f"a refused file changed the model: {changed}")
        attempt(tally, f"{case} (unloaded)", model.unload)
        if changed := difference(before, surface(base)):
            tally.fail(case, f"the base model is another: {changed}")
            base_of.cache_clear()
        if contents(tmp_path) != around:
            tally.fail(case, "reading wrote")
    return tally


def test_damaged_packs_editors_and_adapters(tmp_path: Path) -> None:
    others(range(40), tmp_path).check(25)


def moments(seeds: range, tmp_path: Path) -> Tally:
    """Second moments that an earlier edit has left in the cache: read, or taken again; the edit is made."""
    tally = Tally()
    base, tokenizer = load_model("gpt2")
    fact = EditRequest(prompt="{} plays the sport of", subject="Otto", target_new="golf")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The dog stood beside the river. The wall was pale.\n" * 200, encoding="utf-8")

    def edit(cache: Path) -> Any:
        settings: dict[str, Any] = {"stats_dir": str(cache), "stats_dataset": str(corpus), "context_templates": ["{}"]}
        settings["stats_tokens"] = 400
        model = EditableModel(base, ROMEConfig(layers=[1], v_num_grad_steps=2, **settings), tokenizer)
        made = model.edit(fact, show_progress=False)
        assert torch.isfinite(logits(model, [fact.filled_prompt])).all()
        model.unload()
        return made

    edit(tmp_path / "moments")
    pristine = surface(base)
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path / "case" / "moments"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "moments", folder)
        case = f"seed {seed}, moments, {damage_folder(folder, rng)}"
        refused = tally.refused
        if attempt(tally, case, lambda f=folder: edit(f)) is not None:
            tally.worked += 1
        elif tally.refused > refused:
            tally.refused = refused
            tally.fail(case, "a damaged cache is in the way of an edit")
        if difference(pristine, surface(base)):
            tally.fail(case, "the base model is another")
            base, tokenizer = load_model("gpt2")
            pristine = surface(base)
    return tally


def test_damaged_moments(tmp_path: Path) -> None:
    moments(range(10), tmp_path).check(10)


@pytest.mark.slow
def test_many_damaged_moments(tmp_path: Path) -> None:
    moments(range(FIRST, FIRST + LONG // 4), tmp_path).check(LONG // 4)


@pytest.mark.slow
def test_many_damaged_packs_editors_and_adapters(tmp_path: Path) -> None:
    others(range(FIRST, FIRST + LONG), tmp_path).check(LONG // 2)
