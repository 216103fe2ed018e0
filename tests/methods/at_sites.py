"""What the tests of methods at sites share."""

from __future__ import annotations

from typing import Any, Literal

import torch

from hf_kedit import EditableModel, EditRequest, load_edit_dataset
from hf_kedit.engine.capture import Tap, capture_at
from hf_kedit.tokens import pad_rows


def facts(count: int, start: int = 0) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=start + count)
    return [EditRequest.from_dict(rows[i]) for i in range(start, start + count)]


def says(model: EditableModel, prompts: list[str], **options: Any) -> list[str]:
    """Continuations of several prompts in one left-padded batch."""
    rows = [model.tokenizer(p)["input_ids"] for p in prompts]  # type: ignore[misc]
    batch = pad_rows(rows, 0, "left")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **settings)
    texts = model.tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)  # type: ignore[union-attr]
    return [t.strip() for t in texts]


def prompt_logits(model: Any, prompt: str) -> torch.Tensor:
    """Logits of every position of one prompt."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits


def learnt(model: EditableModel, wanted: list[EditRequest]) -> list[bool]:
    """Whether the model says the new target, fact by fact."""
    said = says(model, [f.filled_prompt for f in wanted])
    return [text.startswith(f.target_new) for text, f in zip(said, wanted, strict=True)]


def neighbours(wanted: list[EditRequest]) -> list[str]:
    return [probe.prompt for f in wanted for probe in f.locality["Neighborhood"][:1]]


def without_trace(model: EditableModel) -> bool:
    """Whether nothing of ours hangs on the model's modules (transformers has hooks of its own)."""
    modules = list(model.base_model.modules())
    hooks = [h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    ours = [h for h in hooks if type(getattr(h, "__self__", h)).__module__.startswith("hf_kedit")]
    return "generate" not in model.base_model.__dict__ and not ours


def state_at_key(model: EditableModel, path: str, ids: torch.Tensor, kind: Literal["input", "output"]) -> torch.Tensor:
    """What goes into or comes out of a module at the last token of one prompt."""
    tap = Tap(path, kind)
    found = capture_at(model.base_model, pad_rows(ids.tolist()), torch.tensor([ids.shape[1] - 1]), [tap])
    return found[tap][0]
