"""Hyperparameters of EasyEdit as configs of this library, with a list of what does not carry over, and why.

A key is taken over if the method's config has a field of that name, or of the name that `RENAMED` gives. Numbers that
YAML reads as text (``5e-4``) are converted by the field's type. Everything else is reported, never silently dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnknownMethodError, nearest, shown
from ..registry import CONFIGS, normalise
from ..storage.files import named_path
from .hparams import read_mapping

# Names of methods that are spelt otherwise; `FT` and `LoRA` depend on a second key.
METHODS = {"ice": "ike", "tpatcher": "t-patcher", "ft-uns": "ft-m", "lora-uns": "lora", "unke-are": "anyedit"}
METHODS |= {"mend-multi": "mend", "serac-multi": "serac"}
OBJECTIVES = {"prompt_last": "ft-l", "target_new": "ft-m"}

# Their key → our field, for every method that has the field.
RENAMED = {
    "n_iter": "num_steps",
    "edit_lr": "lr",
    "val_init": "value_init",
    "lora_r": "rank",
    "densities": "density",
    "sentence_model_name": "retriever",
    "cedit": "edit_weight",
    "kl_factor": "edit_weight",
    "suffix_system_prompt": "suffix_prompt",
    "cloc": "locality_weight",
    "loc_coef": "locality_weight",
    "batch_size": "rows_per_step",
    "n_blocks": "num_blocks",
    "optim_num_step": "num_steps",
    "ex_data_num": "held_texts",
    "alpha": "likelihood_weight",
    "lamHyper": "ridge",
    "init_model": "from_original",
    "cumulative_ratio": "sphere_fraction",
    "suppression_strength": "sphere_strength",
    "num_iter": "num_steps",
    "init_radius": "radius",
    "num_block": "num_blocks",
    "num_rank_per_block": "rank",
    "tau": "temperature",
    "weight_decay_method": "length_rule",
    "delta_init": "target_init",
}
# Method → field → their word → ours.
VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "malmen": {"token": {"ans": "answer", "mask": "attended"}},
    "eamet": {"target_init": {"target_init": True}},
}

_BY_STRUCTURE = "modules are found by structure; name them with EditableModel(anatomy=...) where that fails"
_LOADING = "how the model is loaded is said when it is loaded (dtype=, device_map=)"
_QUANTISING = "how the base is quantised is said when it is loaded (quantization_config=BitsAndBytesConfig(...))"
_STATISTICS = (
    "second moments are collected anew; to use finished ones, name the folder of the model in their stats_dir as"
    " stats_dataset"
)
NOT_CARRIED_OVER = {
    "model_class": "the class is read from the model's own config",
    "tokenizer_class": "the class is read from the model's own config",
    "tokenizer_name": "the tokenizer is the model's",
    "device": _LOADING,
    "model_parallel": _LOADING,
    "fp16": _LOADING,
    "bf16": _LOADING,
    "quantization_bit": _QUANTISING,
    "quantization_bits": _QUANTISING,
    "double_quant": _QUANTISING,
    "quant_type": _QUANTISING,
    "rewrite_module_tmp": _BY_STRUCTURE,
    "rewrite_module_tmps": _BY_STRUCTURE,
    "layer_module_tmp": _BY_STRUCTURE,
    "mlp_module_tmp": _BY_STRUCTURE,
    "attn_module_tmp": _BY_STRUCTURE,
    "ln_f_module": _BY_STRUCTURE,
    "lm_head_module": _BY_STRUCTURE,
    "v_loss_layer": "the loss is always read from the model's own output",
    "mom2_dataset": _STATISTICS,
    "mom2_n_samples": _STATISTICS,
    "mom2_dtype": _STATISTICS,
    "stats_dir": _STATISTICS,
    "archive": "trained editors have another format here: `kedit convert-editor` reads theirs; name it with editor=",
    "P_loc": "the projection is computed from the second moments",
    "max_length": "prompts are never cut; one that is too long is an error",
    "objective_optimization": "it chooses between ft-l and ft-m",
    "lora_type": "it chooses between lora and adalora",
    "results_dir": "nothing is written unless asked",
    "batch_size": "here it is an argument of edit(requests, batch_size=...)",
    "enable_thinking": "what a chat template writes before an answer is read from the template",
    "padding_side": "batches are padded where each computation needs it",
}
_OF_TRAINING = "it says how an editor is trained, or how its networks are built: `kedit train`"
# Methods whose own batch_size means our rows_per_step: requests (or points) in one pass.
_OWN_BATCH = ("ft-l", "ft-m", "dpo", "lora", "qlora", "adalora", "kn", "ultraedit")
# Their QLoRA trains towards the target alone, shifted against the prompt; one or two steps of that say nothing here.
_OTHER_OBJECTIVE = "their QLoRA trains on another objective; steps of it are no steps of this one"


@dataclass
class Converted:
    """An EasyEdit hparams file in this library's terms.

    Args:
        config: the method's `EditConfig`, whose class stands above this file.
        model_name: the model that the file is for; ``None`` if it does not say.
        ignored: key → why its value does not count here.
        source: everything that the file says.
    """

    config: Any
    model_name: str | None
    ignored: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def convert_hparams(source: str | Path | Mapping[str, Any]) -> Converted:
    """Read EasyEdit hyperparameters.

    Args:
        source: YAML or JSON file (``.yaml`` may be left out), or its content.

    Raises:
        UnknownMethodError: if ``alg_name`` is no method of this library.
        ConfigError: if the file cannot be read, has no ``alg_name``, or a value is unusable.
    """
    data = dict(source) if isinstance(source, Mapping) else read_mapping(_existing(source))
    if normalise(str(data.get("alg_name"))) == "unke-are":  # one file for what is a method and its base here
        own = {key: data.pop(key) for key in ("window_size",) if key in data}
        written = convert_hparams({**data, "alg_name": "unke"})
        return replace(written, config=CONFIGS.get("anyedit")(base=written.config, **own))
    cls = CONFIGS.get(_method(data))
    known = {f.name for f in fields(cls)}
    values: dict[str, Any] = {}
    language = data.pop("name", None)  # of an image-text model; model_name is a word of theirs then
    if cls.edit_type == "melo":
        data, language = _one_level(data)
    named = data.pop("model_name", None)
    converted = Converted(cls(), language or named, source=dict(data))
    data.pop("alg_name")
    for key, value in data.items():
        name = key if key in known else RENAMED.get(key, key)
        if key == "num_steps" and cls.edit_type == "qlora":
            converted.ignored[key] = _OTHER_OBJECTIVE
        elif key == "mom2_update_weight" and isinstance(value, list) and "layer_weights" in known:
            values |= {"layer_weights": value, "mom2_update_weight": value[-1]}  # EAMET and NAMET: one per layer
        elif key == "base_method" and "base" in known:
            values["base"] = _method({"alg_name": value})
        elif key == "use_chat_template":
            values |= {"prompt_format": "chat"} if value else {}
        elif key == "use_icl_examples" and "k" in known:
            values |= {} if value else {"k": 0}  # their ICE
        elif key == "inner_params" and value:
            if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
                raise ConfigError(f"inner_params = {shown(value)}: must be a list of names of parameters")
            values |= _inner_params(value, known, converted.ignored)
        elif name == "stats_dir" or name not in known or (key == "batch_size" and cls.edit_type not in _OWN_BATCH):
            why = _OF_TRAINING if "editor" in known else f"{cls.__name__} has no such field"
            converted.ignored[key] = NOT_CARRIED_OVER.get(key) or why
        elif value is False and not isinstance(getattr(converted.config, name), bool):
            values[name] = None  # a number that is switched off (norm_constraint)
        elif value is not None and value != []:
            values[name] = value
    for name, words in VALUES.get(cls.edit_type, {}).items():
        if values.get(name) in words:
            values[name] = words[values[name]]
    converted.config = cls.from_dict({**cls.published(), **values})
    return converted


def _one_level(data: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A file of MELO's, whose fields stand in sections, as one without, and the name of its model.

    LoRA's section says how the published code prepares its adapters: the rank that counts is that of a block.
    """
    parts = {name: data.get(name) for name in ("grace", "model", "lora")}
    if not all(part is None or isinstance(part, Mapping) for part in parts.values()):
        return dict(data), None
    grace, model, lora = (dict(part or {}) for part in parts.values())
    found = model.pop("name", None)
    if "grace_layer" in model:
        model["inner_params"] = [model.pop("grace_layer")]
    flat = {key: value for key, value in data.items() if key not in parts}
    lora = {key: value for key, value in lora.items() if key not in ("lora_r", *grace, *model)}
    grace.pop("name", None)
    return {**flat, **lora, **model, **grace}, found if isinstance(found, str) else None


def _existing(source: str | Path) -> Path:
    path = named_path(source, "the hyperparameters", ConfigError)
    return path if path.exists() or path.suffix in (".yaml", ".yml", ".json") else path.with_name(path.name + ".yaml")


def _method(data: Mapping[str, Any]) -> str:
    """Our name of the method that a file is for."""
    name = data.get("alg_name")
    if not isinstance(name, str) or not name.strip():
        if "alg" in data:
            raise ConfigError(
                "this EasyEdit file says how an editor is trained: `kedit convert-hparams` makes a plan for `kedit"
                " train` of it"
            )
        raise ConfigError("an EasyEdit hparams file needs 'alg_name', the name of the method")
    if normalise(name) in ("deepedit-api", "ft-api", "ike-api"):
        raise UnknownMethodError(
            f"alg_name {name!r} edits a model behind an API, which no file describes here:"
            " EditableModel.from_backend(…) (docs/scenarios/black_box.md)"
        )
    if normalise(name) in ("dola", "deco"):
        raise UnknownMethodError(
            f"alg_name {name!r} is a way of decoding and edits nothing: model.decoding({normalise(name)!r}, layers=…)"
            " around generate, or model.set_decoding(…) to save it with edits (docs/scenarios/decoding.md)"
        )
    if normalise(name) == "ft":
        objective = str(data.get("objective_optimization", "prompt_last"))
        if objective not in OBJECTIVES:
            raise ConfigError(f"objective_optimization = {objective!r}.{nearest(objective, OBJECTIVES)}")
        return OBJECTIVES[objective]
    if normalise(name) == "lora":
        return normalise(str(data.get("lora_type") or "lora"))
    ours = METHODS.get(normalise(name), normalise(name))
    try:
        CONFIGS.get(ours)
    except UnknownMethodError as error:
        raise UnknownMethodError(f"alg_name {name!r}: {error}") from error
    return ours


def module_names(parameters: Iterable[Any]) -> list[str]:
    """Modules of parameters in the notation ``transformer.h[35].mlp.c_fc.weight`` or ``transformer.h.35.mlp…``."""
    return [re.sub(r"\[(\d+)\]", r".\1", str(name)).removesuffix(".weight") for name in parameters]


def _inner_params(value: Any, known: set[str], ignored: dict[str, str]) -> dict[str, Any]:
    """Parameters as modules, or a module and its layers, whichever the method has."""
    names = module_names(value)
    if "modules" in known:
        return {"modules": names}
    templates = {re.sub(r"\.\d+\.", ".{}.", n, count=1) for n in names}
    layers = [int(m.group(1)) for n in names if (m := re.search(r"\.(\d+)\.", n))]
    if "module" in known and len(templates) == 1 and len(layers) == len(names):
        return {"module": templates.pop(), "layers": layers}
    ignored["inner_params"] = _BY_STRUCTURE
    return {}
