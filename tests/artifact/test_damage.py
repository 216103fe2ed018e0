"""Damaged saved edits whose hashes are right: refused, with an error that names what is wrong."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import EditableModel, PromptConfig, embedded
from hf_kedit.artifact.layout import ADAPTER_WEIGHTS, CONFIG, JOURNAL, WEIGHTS
from hf_kedit.artifact.reading import find_artifact
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ArtifactError, ConfigError, MissingExtraError
from hf_kedit.journal import Journal

from .test_files_of_0_1_0 import DATA

LAYER = "transformer.h.2.mlp.c_proj.weight"
Change = Callable[[Any], Any]


class Base:
    """A base model that must come out of every refused load as it was."""

    def __init__(self, name: str):
        self.model = AutoModelForCausalLM.from_pretrained(embedded.path(name))
        self.model(input_ids=torch.tensor([[5]]), output_hidden_states=True)  # transformers hooks itself then
        self.tokenizer = AutoTokenizer.from_pretrained(embedded.path(name))
        self.before = self.state()

    def state(self) -> tuple[str, set[str], list[int]]:
        """Weights, attributes and hooks (transformers has some of its own)."""
        hooks = [len(module._forward_hooks) for module in self.model.modules()]
        return model_digest(self.model), {*vars(self.model)}, hooks

    def refuses(self, folder: Path, message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            EditableModel.from_pretrained(folder, base_model=self.model, tokenizer=self.tokenizer)
        assert self.state() == self.before


@pytest.fixture(scope="module")
def gpt2() -> Base:
    return Base("world-gpt2")


@pytest.fixture(scope="module")
def llama() -> Base:
    return Base("world-llama")


def damaged(
    name: str, folder: Path, config: Change | None = None, tensors: Change | None = None, journal: Change | None = None
) -> Path:
    """A copy of a saved edit of 0.1.0, changed, with hashes that fit again."""
    folder = Path(shutil.copytree(DATA / name, folder / "damaged", dirs_exist_ok=True))
    described = json.loads((folder / CONFIG).read_text())
    weights = folder / (ADAPTER_WEIGHTS if described.get("tensors_in_adapter") else WEIGHTS)
    if tensors is not None:
        content = load_file(weights)
        tensors(content)
        save_file({key: value.contiguous() for key, value in content.items()}, weights)
    if journal is not None:
        (folder / JOURNAL).write_text(journal((folder / JOURNAL).read_text()))
    for file in (weights, folder / JOURNAL):
        described["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    if config is not None:
        config(described)
    (folder / CONFIG).write_text(json.dumps(described))
    return folder


def put(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith(key)]
        assert names
        tensors.update({name: change(tensors[name].clone()) for name in names})

    return apply


def one_is(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # 1e25 · 1e25 is beyond fp32, and so is the norm of what is not
        (lambda t: [put(k, lambda x: torch.full_like(x, 1e25))(t) for k in ("_U", "_V")], "infinity"),
        (put("_U", lambda x: x * 1e30), "infinity"),
        (put("_U", one_is(float("nan"))), "NaN"),
        (put("_V", one_is(float("inf"))), "NaN"),
        (put("_U", lambda x: x.reshape(-1)[0]), "shape"),
        (put("_U", lambda x: x[:, :1]), "shape"),
        (put("_V", lambda x: x[:-1]), "shape"),
        (put("_U", lambda x: (x * 100).long()), "floating point"),
        (put("_U", lambda x: x > 0), "floating point"),
        (lambda t: t.update({key: torch.cat([v, v], dim=1) for key, v in t.items()}), "columns do not fit"),
        (lambda t: t.update(stranger=torch.zeros(3)), "does not say what the tensor 'stranger'"),
        (lambda t: t.update({"other.weight.delta_U": torch.zeros(3, 1)}), "does not say"),
        (lambda t: t.pop(f"{LAYER}.delta_V"), "missing"),
    ],
)
def test_factors(change: Change, message: str, gpt2: Base, tmp_path: Path) -> None:
    gpt2.refuses(damaged("rome_gpt2", tmp_path, tensors=change), message)


def test_sums_that_overflow_in_the_weights_own_format(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", dtype=torch.float16)

    def half(config: Any) -> None:
        config["modules"][LAYER]["base_sha256"] = "x"

    folder = damaged("rome_gpt2", tmp_path, half, put("_U", lambda x: x * 1e5))
    with pytest.raises(ArtifactError, match="infinity"):
        EditableModel.from_pretrained(
            folder, base_model=model.base_model, tokenizer=model.tokenizer, ignore_fingerprint=True
        )


def first_module(config: Any) -> Any:
    return next(iter(config["modules"].values()))


def without(*path: str) -> Change:
    def apply(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return apply


def is_now(value: Any, *path: str) -> Change:
    def apply(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("modules", "model.layers.2.mlp.down_proj.weight"), "does not say what the tensor"),
        (lambda c: first_module(c)["pieces"][0].pop("batch_id"), "damaged"),
        (lambda c: first_module(c)["pieces"][0].update(batch_id=5), "damaged"),
        (lambda c: first_module(c)["pieces"][0].update(start="0"), "damaged|do not fit"),
        (lambda c: first_module(c)["pieces"].append(copy.deepcopy(first_module(c)["pieces"][0])), "do not fit"),
        (lambda c: first_module(c)["pieces"].clear(), "does not say|infinity|different"),
        (lambda c: first_module(c).update(shape=7), "module"),
        (lambda c: first_module(c).pop("rank"), "module"),
        (lambda c: c["modules"].update(x=5), "module 'x'"),
        (is_now([], "books"), "books"),
        (is_now({"weights": 1}, "books"), "weights"),
        (is_now({"adapter": 1}, "books"), "adapter"),
        (is_now([1], "context_templates"), "context_templates"),
        (is_now({"a": 5}, "context_templates"), "context_templates"),
        (is_now({"a": [["no place"]]}, "context_templates"), "context_templates"),
        (is_now({"a": [[5]]}, "context_templates"), "context_templates"),
        (is_now(5, "anatomy"), "anatomy"),
        (is_now({"down": 5}, "anatomy"), "anatomy"),
        (is_now("int8", "quantization_config"), "quantization_config"),
        (is_now(7, "base_dtype"), "base_dtype"),
        (is_now("yes", "head_tied"), "head_tied"),
        (is_now(True, "format_version"), "format_version"),
        (is_now(["rome"], "hparams"), "hparams"),
        (is_now({"x": 1}, "files"), "files"),
    ],
)
def test_descriptions(change: Change, message: str, llama: Base, tmp_path: Path) -> None:
    llama.refuses(damaged("memit_llama_per_edit", tmp_path, change), message)


def test_a_dense_change_that_is_named_twice(gpt2: Base, tmp_path: Path) -> None:
    def twice(config: Any) -> None:
        pieces = first_module(config)["pieces"]
        pieces.append(copy.deepcopy(pieces[0]))

    gpt2.refuses(damaged("ft_m_gpt2_dense", tmp_path, twice), "one tensor")


def test_a_number_format_is_not_any_name_of_torch(tmp_path: Path) -> None:
    for name in ("load", "nn", "hub", "float33", "int8", "bool", "complex64", "float8_e4m3fn"):
        folder = damaged("rome_gpt2", tmp_path, is_now(name, "base_dtype"))
        assert next(EditableModel.from_pretrained(folder).base_model.parameters()).dtype == torch.float32


def test_an_unknown_quantisation(tmp_path: Path) -> None:
    folder = damaged("rome_gpt2", tmp_path, is_now({"quant_method": "none such"}, "quantization_config"))
    with pytest.raises(ArtifactError, match="quantization_config"):
        EditableModel.from_pretrained(folder)


def test_the_journal_names_what_the_books_hold(gpt2: Base, tmp_path: Path) -> None:
    def one_more(text: str) -> str:
        return text + json.dumps(json.loads(text.splitlines()[0]) | {"edit_id": "stranger"}) + "\n"

    gpt2.refuses(damaged("rome_gpt2", tmp_path, journal=one_more), "different edits")
    gpt2.refuses(damaged("rome_gpt2", tmp_path, journal=lambda t: t.splitlines()[0] + "\n"), "not in edits.jsonl")
    gpt2.refuses(damaged("rome_gpt2", tmp_path, journal=lambda t: t + t), "twice")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"edit_id": ' + "9" * 5_000 + "}", "\ufeff{", "nul", '"\\ud83d"'])
def test_json_that_no_parser_likes(text: str, tmp_path: Path) -> None:
    folder = damaged("rome_gpt2", tmp_path, journal=lambda _: text)
    with pytest.raises(ArtifactError, match=r"edits\.jsonl"):
        find_artifact(str(folder))
    (folder / CONFIG).write_text(text)
    with pytest.raises(ArtifactError, match=CONFIG):
        find_artifact(str(folder))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("melo_llama", put("melo_A", one_is(float("inf"))), "infinity"),
        ("melo_llama", put("melo_B", lambda x: x * 1e30), "infinity"),
        ("melo_llama", put("melo_points", lambda x: x[:, :-1]), "shape"),
        ("defer_llama", lambda t: t.update({k: torch.full_like(v, 1e38) for k, v in t.items()}), "infinity"),
        ("grace_gpt2", put("grace_values", lambda x: x[0, 0]), "shape"),
        ("grace_gpt2", put("grace_keys", lambda x: x.long()), "floating point"),
        ("wise_gpt2", put("_bits", lambda x: x.float()), "uint8"),
        ("wise_gpt2", put("_values", lambda x: x > 0), "floating point"),
        ("t_patcher_gpt2", put("_values", lambda x: x[..., :-1]), "not fit|valid|shape|damaged"),
        ("t_patcher_gpt2", put("_queries", lambda x: x[..., :-1]), "of one length"),  # the next edit would read them
        ("ultraedit_llama_state", put(".spread", one_is(float("nan"))), "running statistics"),
        ("ultraedit_llama_state", put(".spread", one_is(-1.0)), "running statistics"),
        ("ultraedit_llama_state", put(".count", lambda x: x * float("inf")), "running statistics"),
    ],
)
def test_memories(name: str, change: Change, message: str, gpt2: Base, llama: Base, tmp_path: Path) -> None:
    (gpt2 if name.endswith("gpt2") else llama).refuses(damaged(name, tmp_path, tensors=change), message)


def test_embeddings_of_unlike_width(gpt2: Base, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", PromptConfig(retriever="model"))
    for subject in ("Tarosk Boayond", "Japirim Moflu"):
        model.edit(prompt="{} is a", subject=subject, target_new="plumber", show_progress=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for shortened in (["prompts.embeddings.1"], list(tensors)):  # unlike each other; alike, but no states of the model
        changed = {k: v[:-1].contiguous() if k in shortened else v for k, v in tensors.items()}
        save_file(changed, tmp_path / WEIGHTS)
        config = json.loads((tmp_path / CONFIG).read_text())
        config["files"][WEIGHTS] = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
        (tmp_path / CONFIG).write_text(json.dumps(config))
        gpt2.refuses(tmp_path, "not those of the retriever 'model'")


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[:0], lambda x: torch.cat([x, x])])
def test_embeddings_of_another_encoder(change: Change, gpt2: Base, tmp_path: Path) -> None:
    gpt2.refuses(damaged("serac_gpt2", tmp_path, tensors=put("embeddings.0", change)), "not those of the retriever")


@pytest.mark.parametrize(
    "field", ["scope", "subject", "fact", "nearest_last", "retriever", "reader", "soft", "edit_id"]
)
@pytest.mark.parametrize("value", [["x"], {"value": False}, 7])
def test_entries_of_prompts(field: str, value: Any, gpt2: Base, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["books"]["prompt"]["entries"][0][field] = value

    gpt2.refuses(damaged("prompt_gpt2", tmp_path, change), f"damaged description of a prompt.*{field}")


@pytest.mark.parametrize("field", ["reader", "retriever"])
@pytest.mark.parametrize("name", ["no-such-model", "The first language of Otto is", "../../outside", "/etc/hostname"])
def test_models_that_prompts_need_and_nobody_has(field: str, name: str, gpt2: Base, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["books"]["prompt"]["entries"][0][field] = name

    folder = damaged("prompt_gpt2", tmp_path, change)
    with pytest.raises((ConfigError, MissingExtraError), match=re.escape(name)):
        EditableModel.from_pretrained(folder, base_model=gpt2.model, tokenizer=gpt2.tokenizer)
    assert gpt2.state() == gpt2.before


def test_the_description_has_a_hash(gpt2: Base, tmp_path: Path) -> None:
    model = EditableModel.from_pretrained(DATA / "rome_gpt2")
    model.save_pretrained(tmp_path)
    whole = (tmp_path / CONFIG).read_text()
    config = json.loads(whole)
    for change in (is_now(0.9, "hparams", "v_lr"), is_now("x", "kedit_version"), without("library_versions")):
        changed = json.loads(whole)
        change(changed)
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        gpt2.refuses(tmp_path, "was changed|v_lr")
    # where the base model is may be changed by hand
    (tmp_path / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(embedded.path("world-gpt2"))}))
    again = EditableModel.from_pretrained(tmp_path)
    assert model_digest(again.base_model) == model_digest(model.base_model)


def test_a_journal_that_cannot_be_read_leaves_the_garbage_collector_on() -> None:
    with pytest.raises(ArtifactError):
        Journal.from_jsonl('{"edit_id": "a"}\n')
    assert gc.isenabled()
