"""Methods on a model on a stand-in, or spread over one and the CPU: make, edit, generate, save, load, undo, score.

``python -m tests.devices.rehearsal one|split|turned METHOD …`` prints a line for each method, and a fault's traceback.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import tests.conftest  # noqa: F401 - caches in a temporary folder, one thread
from hf_kedit import EditableModel, load_edit_dataset
from hf_kedit.evaluation import evaluate_edits
from hf_kedit.loading import load_base, load_tokenizer
from tests.devices import standin

MODEL = "kedit/world-gpt2"
TOLERANCE = 1e-4


class _Placed(AlignDevicesHook):
    """accelerate's hook, on a module that is where it belongs already."""

    def init_hook(self, module: Any) -> Any:
        """Nothing to move."""
        return module


def spread(model: Any, mode: str) -> Any:
    """The model on the stand-in, or half of it there and half on the CPU, the lower one or (``turned``) the upper one.

    The tied head is with the embeddings, the last norm with the other half.
    """
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


def rehearse(method: str, mode: str | None, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is done with a method; ``None`` for the mode: on the CPU.

    Returns:
        Numbers and texts to compare.
    """
    tokenizer = load_tokenizer(MODEL)

    def base() -> Any:
        loaded = load_base(MODEL)
        return loaded if mode is None else spread(loaded, mode)

    ids = tokenizer(str(facts[0]["prompt"]).replace("{}", str(facts[0]["subject"])), return_tensors="pt")["input_ids"]
    model = EditableModel(base(), method, tokenizer, base_model_id=MODEL)
    before = answers(model, ids)
    model.edit(facts[0], show_progress=False)
    found = {"edited": answers(model, ids)}
    with model.disable_edits():
        assert torch.equal(answers(model, ids), before), "switched off, the bits of the base"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = EditableModel.from_pretrained(folder, base_model=base(), tokenizer=tokenizer)
        assert torch.allclose(answers(again, ids), found["edited"], atol=TOLERANCE), "saved and loaded"
    place = model.base_model.get_input_embeddings().weight.device
    text = model.generate(input_ids=ids.to(place), max_new_tokens=4, do_sample=False, pad_token_id=0)
    found["text"] = text.cpu()
    model.rollback("all")
    assert torch.equal(answers(model, ids), before), "undone, the bits of the base"
    report = evaluate_edits(model, facts[1:2], setting="single", protocol=["teacher_forced"], progress=False)
    found["success"] = torch.tensor(float(report.summary()["post"]["rewrite_acc"]))
    return found


def main() -> int:
    """Rehearse methods on the CPU and on the stand-ins; 1 if something differs or fails."""
    mode, *methods = sys.argv[1:]
    facts = [dict(row) for row in load_edit_dataset("world", split="test", limit=2)]
    standin.install()  # before anything is differentiated: torch counts the devices then
    expected = {method: rehearse(method, None, facts) for method in methods}
    failed = 0
    for method in methods:
        try:
            found = rehearse(method, mode, facts)
            off = {k: float((found[k].float() - v.float()).abs().max()) for k, v in expected[method].items()}
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
