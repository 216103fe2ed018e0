"""All that is done with a method, on a model on a stand-in, or spread over one and the CPU, beside the CPU alone.

``python -m tests.devices.rehearsal one|split|turned|disk[:bfloat16] [METHOD …]`` prints a line for each method (all
there are, if none is named) and a fault's traceback. The statistics of the two runs lie in folders of their own: what
one has collected is no help to the other, and no older file is taken for either.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import tests.conftest  # noqa: F401 - caches in a temporary folder, one thread
from hf_kedit import EditableModel, load_edit_dataset
from hf_kedit.errors import UnsupportedModelError
from hf_kedit.evaluation import evaluate_edits
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods import registered_methods
from tests.devices import standin
from tests.methods.short_settings import short_config

MODEL = "kedit/world-gpt2"
TOLERANCE = 1e-4
NEEDS_QUANTISED = ("qlora",)  # refuses this model, on every device
NOT_HERE = ("ke",)  # torch's LSTM knows fused kernels only on any device but the CPU, and the stand-in has none


class _Placed(AlignDevicesHook):
    """accelerate's hook, on a module that is where it belongs already."""

    def init_hook(self, module: Any) -> Any:
        """Nothing to move."""
        return module


def spread(model: Any, mode: str) -> Any:
    """The model on the stand-in, or half of it there and half on the CPU, the lower one or (``turned``) the upper one.

    The tied head is with the embeddings, the last norm with the other half. ``disk``: on the CPU, with every block
    offloaded, so that no parameter of it is anywhere between two forwards.
    """
    if mode == "disk":
        places = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f"), "cpu")
        places |= {"lm_head": "cpu"} | {f"transformer.h.{i}": "disk" for i in range(len(model.transformer.h))}
        return dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp())
    device, cpu = torch.device(standin.NAME, 0), torch.device("cpu")
    if mode == "one":
        return model.to(device).tie_weights() or model
    first, second = (device, cpu) if mode == "split" else (cpu, device)
    count = len(model.transformer.h)
    places = {f"transformer.h.{i}": first if i < count // 2 else second for i in range(count)}
    places |= {"transformer.wte": first, "transformer.wpe": first, "transformer.drop": first}
    places |= {"transformer.ln_f": second, "lm_head": first}
    for path, place in places.items():
        for part in model.get_submodule(path).to(place).modules():
            add_hook_to_module(part, _Placed(execution_device=place))
    add_hook_to_module(model, _Placed(execution_device=first, io_same_device=True))
    model.tie_weights()
    model.hf_device_map = places
    return model


def answers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits on the CPU."""
    with torch.no_grad():
        return model(input_ids=ids.to(model.base_model.get_input_embeddings().weight.device)).logits.cpu()


def rehearse(method: str, place: Callable[[Any], Any], dtype: str, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is done with a method: make, edit, generate, save, load, export, undo, a batch, score, merge.

    Args:
        method: name.
        place: brings a base model where it is to be.
        dtype: of the model.
        facts: five requests.

    Returns:
        Numbers and texts to compare with those of another place.
    """
    tokenizer = load_tokenizer(MODEL)

    def base() -> Any:
        return place(load_base(MODEL, dtype=dtype))

    ids = tokenizer(str(facts[0]["prompt"]).replace("{}", str(facts[0]["subject"])), return_tensors="pt")["input_ids"]
    model = EditableModel(base(), short_config(method), tokenizer, base_model_id=MODEL)
    before = answers(model, ids)
    try:
        model.edit(facts[0], show_progress=False)
    except UnsupportedModelError:
        assert method in NEEDS_QUANTISED
        return {"refused": torch.ones(1)}
    found = {"edited": answers(model, ids)}
    with model.disable_edits():
        assert torch.equal(answers(model, ids), before), "switched off, the bits of the base"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = EditableModel.from_pretrained(folder, base_model=base(), tokenizer=tokenizer)
        assert torch.allclose(answers(again, ids), found["edited"], atol=TOLERANCE), "saved and loaded"
    capabilities = registered_methods()[method].capabilities
    if capabilities.kind == "weights" and capabilities.low_rank:
        with tempfile.TemporaryDirectory() as folder:
            model.export_lora(folder)
    where = model.base_model.get_input_embeddings().weight.device
    text = model.generate(input_ids=ids.to(where), max_new_tokens=4, do_sample=False, pad_token_id=0)
    found["text"] = text.cpu()
    model.rollback("all")
    assert torch.equal(answers(model, ids), before), "undone, the bits of the base"
    model.edit(facts[2:5], show_progress=False)
    found["batch"] = answers(model, ids)
    model.rollback("all")
    assert torch.equal(answers(model, ids), before), "a batch undone, the bits of the base"
    report = evaluate_edits(model, facts[1:2], setting="single", protocol=["teacher_forced"], progress=False)
    found["success"] = torch.tensor(float(report.summary()["post"]["rewrite_acc"]))
    if capabilities.kind == "weights":
        model.edit(facts[0], show_progress=False)
        found["merged"] = answers(model.merge_and_unload(), ids)
    return found


def main() -> int:
    """Rehearse methods on the CPU and on the stand-in; 1 if something differs or fails."""
    mode, *methods = sys.argv[1:]
    mode, _, dtype = mode.partition(":")
    facts = [dict(row) for row in load_edit_dataset("world", split="test", limit=5)]
    apart: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if mode != "disk":  # which has the CPU alone
        standin.install()  # before anything is differentiated: torch counts the devices then
        apart = standin.away
    failed = 0
    with tempfile.TemporaryDirectory() as caches:

        def run(method: str, name: str, place: Callable[[Any], Any]) -> dict[str, Any]:
            os.environ["HF_KEDIT_CACHE"] = os.path.join(caches, name)
            with apart() if name == "cpu" else contextlib.nullcontext():
                return rehearse(method, place, dtype or "float32", facts)

        for method in methods or [m for m in registered_methods() if mode == "disk" or m not in NOT_HERE]:
            try:
                expected, found = (
                    run(method, "cpu", lambda base: base),
                    run(method, mode, lambda base: spread(base, mode)),
                )
                off = {k: float((found[k].float() - v.float()).abs().max()) for k, v in expected.items()}
                good = all(value <= TOLERANCE for value in off.values())
                print(method, "same" if good else f"DIFFERS {off}", flush=True)
                failed += not good
            except Exception:
                failed += 1
                print(method, "FAULT", flush=True)
                traceback.print_exc()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
