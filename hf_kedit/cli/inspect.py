"""``kedit inspect``: what is in saved edits, or how a model is built and what a method would do with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .models import MethodOption, RevisionOption, TrustOption, edits_at, hush_transformers, loading
from .output import DebugOption, Format, FormatOption, command, counted, emit, moments_line, size_of

if TYPE_CHECKING:
    from ..anatomy import Anatomy
    from ..artifact.layout import Artifact

_SHOWN = 50


@command
def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="EDITS_OR_MODEL", help="Folder or Hub id of saved edits, or of a model; or a GGUF file."
        ),
    ],
    method: MethodOption = None,
    load: Annotated[
        bool, typer.Option("--load", help="Load the weights too, and check the anatomy on a forward pass.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show the whole anatomy of a model and every hyperparameter.")
    ] = False,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Show saved edits; or a model's anatomy and the hyperparameters that a method would use.

    Neither needs weights to be loaded: a model is built from its config alone.
    """
    hush_transformers()
    artifact = edits_at(source, revision)
    if artifact is not None:
        data = describe_artifact(artifact)
        emit(format, data, human=lambda c: _show_artifact(c, data), quiet=[e["edit_id"] for e in data["edits"]])
        return
    with loading(source):
        model = _build(source, load, revision, trust_remote_code)
    anatomy = _anatomy(model, load)
    data = _describe_model(source, model, anatomy, method, load)
    emit(
        format,
        data,
        human=lambda c: _show_model(c, data, anatomy, everything or load),
        quiet=[place.path for layer in anatomy.layers if (place := layer.down or layer.experts) is not None],
    )


# ---------------------------------------------------------------------- saved edits


def describe_artifact(artifact: Artifact) -> dict[str, Any]:
    """Everything about saved edits that their files tell, JSON-ready."""
    config = artifact.config
    folder = Path(artifact.source)
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    return {
        "kind": "edits",
        "source": artifact.source,
        "base_model": config["base_model_name_or_path"],
        "base_model_folder": config.get("base_model_folder"),
        "base_model_revision": config.get("base_model_revision"),
        "base_model_class": config.get("base_model_class"),
        "base_dtype": config.get("base_dtype"),
        "method": config["method"],
        "hparams": config["hparams"],
        "kedit_version": config.get("kedit_version"),
        "format_version": config["format_version"],
        "modules": [
            {
                "weight": key,
                "shape": entry["shape"],
                "rank": entry["rank"],
                "storage": "factors" if entry["rank"] else "dense",
                "bytes": sum(
                    t.numel() * t.element_size() for n, t in artifact.tensors.items() if n.startswith(f"{key}.delta")
                ),
            }
            for key, entry in config["modules"].items()
        ],
        "edits": [
            {
                "edit_id": e.id,
                "method": e.method,
                "batch_id": e.batch_id,
                "created": e.created,
                "prompt": e.request.filled_prompt,
                "subject": e.request.subject,
                "ground_truth": e.request.ground_truth,
                "target_new": e.request.target_new,
                "moments": e.diagnostics.get("moments"),
            }
            for e in artifact.journal
        ],
        "files": {p.name: p.stat().st_size for p in files},
    }


def _show_artifact(console: Console, data: dict[str, Any]) -> None:
    n = len(data["edits"])
    folder = data["base_model_folder"]
    elsewhere = f"{folder} (a folder of the machine that they come from)" if folder else "a model in memory"
    console.print(f"{counted(n, 'edit')} of {data['base_model'] or elsewhere}", style="bold")
    revision = f", revision {data['base_model_revision']}" if data["base_model_revision"] else ""
    console.print(f"{data['base_model_class']}, {data['base_dtype']}{revision}; last method {data['method']}\n")
    if n:
        _show_edits(console, data)
    console.print("files   " + ", ".join(f"{name} {size_of(size)}" for name, size in data["files"].items()))


def _show_edits(console: Console, data: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("edit", "method", "prompt", "was", "now"):
        table.add_column(name, overflow="fold")
    for e in data["edits"][:_SHOWN]:
        table.add_row(e["edit_id"], e["method"], e["prompt"], ", ".join(e["ground_truth"]) or "?", e["target_new"])
    console.print(table)
    if len(data["edits"]) > _SHOWN:
        console.print(f"… and {len(data['edits']) - _SHOWN} more (--format json shows all)")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("changed weight", "shape", "change", "size"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for m in data["modules"]:
        change = f"rank {m['rank']}" if m["rank"] else "dense"
        table.add_row(m["weight"], " x ".join(map(str, m["shape"])), change, size_of(m["bytes"]))
    console.print(table)
    console.print()
    for line in dict.fromkeys(moments_line(e["moments"]) for e in data["edits"] if e["moments"]):
        console.print(line, soft_wrap=True)


# ---------------------------------------------------------------------- models


def _build(source: str, load: bool, revision: str | None, trust_remote_code: bool) -> Any:
    """The model: with its weights, or on the meta device from its config alone."""
    from ..loading import load_base, load_config

    if not load:
        import torch
        import transformers

        config = load_config(source, revision=revision, trust_remote_code=trust_remote_code)
        # The class that the checkpoint was saved from; remote code and headless checkpoints take the other way.
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        if cls is not None and cls.can_generate():
            with torch.device("meta"):
                return cls._from_config(config)
    return load_base(source, revision=revision, trust_remote_code=trust_remote_code)


def _anatomy(model: Any, load: bool) -> Anatomy:
    from ..anatomy import check_anatomy, resolve_anatomy

    anatomy = resolve_anatomy(model)
    return check_anatomy(model, anatomy) if load else anatomy


def _describe_model(source: str, model: Any, anatomy: Anatomy, method: str | None, load: bool) -> dict[str, Any]:
    parameters = sum(p.numel() for p in model.parameters())
    data: dict[str, Any] = {
        "kind": "model",
        "source": source,
        "parameters": parameters,
        "dtype": str(getattr(model.config, "dtype", None) or next(model.parameters()).dtype).removeprefix("torch."),
        "checked": load,
        "anatomy": anatomy.to_dict(),
        "method": None,
        "config": None,
        "settings": None,
        "hparams_file": None,
        "does": None,
        "needs": None,
        "edited_modules": None,
    }
    if method is not None:
        from ..anatomy import profile_of
        from ..config import AutoEditConfig
        from ..config.hparams import find_hparams, place_of
        from ..methods import method_class

        config = AutoEditConfig.for_method(method).complete(profile_of(model, anatomy, source))
        capabilities = method_class(config).capabilities
        full, defaults = config.to_dict(), type(config)().to_dict()
        file = find_hparams(config.edit_type, source)
        data["method"] = capabilities.name
        data["config"] = full
        data["settings"] = {key: value for key, value in full.items() if value != defaults[key]}
        data["hparams_file"] = None if file is None else place_of(file[0])
        data["does"] = capabilities.summary
        moments = "stats_tokens" in full and full.get("mom2_adjustment", True)
        needs = {
            "the subject of every fact": capabilities.needs_subject,
            "a trained editor (kedit train)": capabilities.needs_training and full.get("editor") is None,
            "second moments (collected at the first edit, or before by kedit stats)": moments,
        }
        data["needs"] = [need for need, holds in needs.items() if holds]
        data["edited_modules"] = [anatomy.down(layer).path for layer in config.layers or []]
    return data


def _show_model(console: Console, data: dict[str, Any], anatomy: Anatomy, everything: bool) -> None:
    console.print(f"{data['source']}: {data['parameters']:,} parameters, {data['dtype']}", style="bold")
    console.print(anatomy.describe() if everything else _in_short(anatomy), soft_wrap=True)
    if data["config"] is None:
        console.print("\n--method NAME shows what a method would do with it, --all the whole anatomy")
        return
    console.print(f"\n{data['method']}", style="bold")
    if everything:
        for key, value in data["config"].items():
            console.print(f"  {key}: {value}")
        console.print("edits", ", ".join(data["edited_modules"]), soft_wrap=True)
        return
    rows = {
        "does": data["does"],
        "at": ", ".join(data["edited_modules"]),
        "needs": "; ".join(data["needs"]),
        "settings": ", ".join(f"{key}={value}" for key, value in data["settings"].items() if key != "edit_type"),
        "from": data["hparams_file"]
        or "defaults and the model's depth; there is no file for this model (kedit tune finds better settings)",
    }
    for name, text in rows.items():
        if text:
            console.print(f"  {name:<9} {text}", soft_wrap=True)
    console.print("\nkedit edit --set NAME=VALUE changes a setting; --all shows every one")


def _in_short(anatomy: Anatomy) -> str:
    """What of a model's structure one can name in a config, the same for all layers that have it."""
    lines = [
        f"{anatomy.model_class}, {anatomy.num_layers} layers of width {anatomy.hidden_size} in {anatomy.layers_path}"
    ]
    roles = {
        "attention out": lambda layer: layer.attention_out,
        "MLP in": lambda layer: layer.ups[0] if layer.ups else None,
        "MLP out": lambda layer: layer.down,
    }
    for role, take in roles.items():
        found = [(layer, place) for layer in anatomy.layers if (place := take(layer)) is not None]
        if found:
            layer, place = found[0]
            some = "" if len(found) == anatomy.num_layers else f"  (in {len(found)} of the layers)"
            name = place.path.removeprefix(f"{layer.path}.")
            lines.append(f"  {role:<14} {name:<14} {place.in_features} -> {place.out_features}{some}")
    experts = sum(1 for layer in anatomy.layers if layer.experts is not None)
    if experts:
        lines.append(f"  {'experts':<14} in {experts} of the layers")
    return "\n".join(lines)
