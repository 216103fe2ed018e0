"""Damaged saved edits, made by chance: they are refused with a typed error and nothing has changed, or they work.

Every mutation is written with the hashes that belong to it, as somebody would who means harm; the files that 0.1.0 has
saved are the seeds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_kedit import EditableModel
from hf_kedit.artifact.layout import ADAPTER_WEIGHTS, CONFIG, JOURNAL, WEIGHTS
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import KeditError
from tests.artifact.test_files_of_0_1_0 import DATA, EXPECTED

SEEDS = [name for name in EXPECTED if name not in ("exported_lora_llama", "serac_gpt2")]
VALUES: list[Any] = [None, True, -1, 0, 1, 7, 10**30, 1.5, float("inf"), "", "x", "../x", "0", [], [1], {}, {"x": 1}]
PROBE = torch.tensor([[5, 6, 7, 8, 9]])


def mutate(value: Any, chance: random.Random) -> Any:
    """Change one thing somewhere inside a value."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        action = chance.randrange(8)
        if action == 0:
            del changed[key]
        elif action == 1:
            changed[key + "x"] = changed.pop(key)
        elif action == 2:
            changed[key] = changed[chance.choice(list(value))]
        else:
            changed[key] = mutate(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        changed_list = list(value)
        action = chance.randrange(8)
        if action == 0:
            del changed_list[place]
        elif action == 1:
            changed_list.insert(place, copy.deepcopy(value[place]))
        elif action == 2:
            chance.shuffle(changed_list)
        else:
            changed_list[place] = mutate(value[place], chance)
        return changed_list
    if isinstance(value, (int, float)) and not isinstance(value, bool) and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 0.5, 1e20])
    return chance.choice(VALUES)


def mutate_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """Change one tensor: its numbers, its shape, its dtype, its name."""
    if not tensors:
        return {"stranger": torch.zeros(2)}
    name = chance.choice(list(tensors))
    value, changed = tensors[name].clone(), dict(tensors)
    action = chance.randrange(10)
    if action == 0:
        del changed[name]
    elif action == 1:
        changed["stranger"] = value
    elif action == 2:
        changed[name + "x"] = changed.pop(name)
    elif action == 3:
        changed[name] = value.reshape(-1)[:1].reshape(()) if value.numel() else torch.zeros(())
    elif action == 4:
        changed[name] = value[..., :-1].contiguous()
    elif action == 5:
        changed[name] = torch.cat([value, value]).contiguous() if value.dim() else value
    elif action == 6:
        changed[name] = chance.choice([value.to(torch.int64), value.half(), value.double(), value > 0])
    elif value.is_floating_point():
        value = value * chance.choice([1e20, 1e30]) if action == 7 else value
        if action != 7 and value.numel():
            worst = chance.choice([float("nan"), float("inf"), 3e38, -3e38])
            value.view(-1)[chance.randrange(value.numel())] = worst
        changed[name] = value
    return changed


def damage(folder: Path, chance: random.Random) -> str:
    """Change a saved edit and write hashes that fit."""
    config = json.loads((folder / CONFIG).read_text())
    what = chance.choice(["config", "config", "config", "journal", "tensors", "tensors", "bytes"])
    if what == "config":
        files = config["files"]
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            config = mutate(config, chance)
            part = chance.choice(["modules", "books", "hparams", "context_templates"])
            if isinstance(config, dict) and chance.random() < 0.5 and config.get(part):
                config[part] = mutate(config[part], chance)
        if isinstance(config, dict) and isinstance(config.get("files"), dict):
            config["files"] = files
    elif what == "journal":
        lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
        changed = mutate(lines, chance)
        lines = changed if isinstance(changed, list) else [changed]
        (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif what == "tensors":
        file = folder / (ADAPTER_WEIGHTS if config.get("tensors_in_adapter") else WEIGHTS)
        save_file(mutate_tensors(load_file(file), chance), file)
    else:
        file = folder / chance.choice([CONFIG, JOURNAL, WEIGHTS])
        data = bytearray(file.read_bytes())
        for _ in range(chance.choice([1, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            data = data[: chance.randrange(len(data))]
        file.write_bytes(bytes(data))
        if file.name == CONFIG:
            return what
    if isinstance(config, dict) and isinstance(config.get("files"), dict):
        for name in (WEIGHTS, JOURNAL, ADAPTER_WEIGHTS):
            if name in config["files"]:
                config["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))
    return what


class Tries:
    """Base models that are used again as long as they are unchanged."""

    def __init__(self, root: Path):
        self.root = root
        loaded = {name: EditableModel.from_pretrained(name) for name in ("kedit/world-gpt2", "kedit/world-llama")}
        self.tokenizers = {name: model.tokenizer for name, model in loaded.items()}
        self.bases = {name: model.unload() for name, model in loaded.items()}
        self.digests = {name: model_digest(base) for name, base in self.bases.items()}

    def use(self, model: EditableModel) -> None:
        """Ask the edited model, save its edits and undo them."""
        with torch.no_grad():
            for ids in (PROBE, *(model.tokenizer([e.request.filled_prompt])["input_ids"] for e in model.edits[:1])):
                ids = torch.as_tensor(ids)
                if not bool(torch.isfinite(model(input_ids=ids).logits).all()):
                    raise ValueError("NaN")
                model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model.save_pretrained(self.root / "again")
        if model.edits:
            model.rollback("all")

    def one(self, number: int) -> str:
        """Damage a saved edit and load it; return how that ended."""
        chance = random.Random(number)
        name = chance.choice(SEEDS)
        folder = self.root / "edits"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(DATA / name, folder)
        what = damage(folder, chance)
        about = f"mutation {number} ({what} of {name})"
        base_name = EXPECTED[name]["base"]
        base, tokenizer = self.bases[base_name], self.tokenizers[base_name]
        half = name.endswith("bf16")
        outcome = "refused"
        try:
            options = {} if half or name.endswith("untied") else {"base_model": base, "tokenizer": tokenizer}
            model = EditableModel.from_pretrained(folder, **options)
            outcome = "loaded"
            self.use(model)
        except KeditError:
            assert outcome == "refused", f"{about}: cannot be used"
        except Exception as error:
            raise AssertionError(f"{about}: {type(error).__name__} is not typed") from error
        assert model_digest(base) == self.digests[base_name], f"{about}: the base model has changed"
        assert "forward" not in base.__dict__ and "generate" not in base.__dict__, about
        assert base.config.tie_word_embeddings, about
        return outcome


@pytest.fixture(scope="module")
def tries(tmp_path_factory: pytest.TempPathFactory) -> Tries:
    return Tries(tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("part", range(4))
def test_damaged_saved_edits(part: int, tries: Tries) -> None:
    outcomes = [tries.one(number) for number in range(part * 40, part * 40 + 40)]
    assert outcomes.count("refused") > 20


@pytest.mark.slow
def test_many_damaged_saved_edits(tries: Tries) -> None:
    outcomes = [tries.one(number) for number in range(1_000, 6_000)]
    assert 2_500 < outcomes.count("refused") < 5_000
