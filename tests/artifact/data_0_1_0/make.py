"""How these files were made: with hf_kedit 0.1.0, by this script (the folder to fill is its argument).

They stay as they are. `tests/artifact/test_files_of_0_1_0.py` reads them with the present code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hf_kedit import (
    EditableModel,
    EditRequest,
    FTMConfig,
    GRACEConfig,
    LoRAConfig,
    MEMITConfig,
    UltraEditConfig,
    load_edit_dataset,
)

GPT2, LLAMA = "kedit/world-gpt2", "kedit/world-llama"
PROBE = [[5, 6, 7, 8, 9]]


def facts(start: int, count: int) -> list[EditRequest]:
    rows = load_edit_dataset("world", split="test", limit=start + count)
    chosen = [{k: v for k, v in rows[i].items() if k in KEPT} for i in range(start, start + count)]
    return [EditRequest.from_dict(row | {"id": f"fact-{start + i}"}) for i, row in enumerate(chosen)]


KEPT = ("prompt", "subject", "target_new", "ground_truth")


def expected(model: Any, prompts: list[str]) -> dict[str, Any]:
    """What the edited model says: logits at one place, and greedy answers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROBE)).logits[0, -1, :20]
        at_prompt = model(**model.tokenizer(prompts[0], return_tensors="pt")).logits[0, -1, :20]
    answers = {}
    for prompt in prompts:
        ids = model.tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        answers[prompt] = model.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    return {"logits": logits.tolist(), "logits_at_prompt": at_prompt.tolist(), "answers": answers}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    said: dict[str, Any] = {}

    def keep(name: str, model: EditableModel, **options: Any) -> None:
        model.save_pretrained(root / name, **options)
        prompts = [e.request.filled_prompt for e in model.edits] + [facts(9, 1)[0].filled_prompt]
        said[name] = {"base": model.base_model_id, "ids": [e.id for e in model.edits], **expected(model, prompts)}

    def edited(base: str, config: Any, *groups: tuple[int, int], **options: Any) -> EditableModel:
        model = EditableModel.from_pretrained(base, config, **options)
        for start, count in groups:
            model.edit(facts(start, count), show_progress=False)
        return model

    keep("rome_gpt2", edited(GPT2, "rome", (0, 2)))
    keep("memit_llama_per_edit", edited(LLAMA, MEMITConfig(layers=[2, 3]), (0, 3)), per_edit=True)
    keep("alphaedit_gpt2", edited(GPT2, "alphaedit", (0, 2), (2, 1)))
    attention = FTMConfig(layers=[2], modules=["transformer.h.{}.attn.c_proj"], lr=2e-3, train_bias=True)
    keep("ft_m_gpt2_dense", edited(GPT2, attention, (0, 1)))
    keep("lora_gpt2_bf16", edited(GPT2, LoRAConfig(layers=[3], rank=2), (0, 1), dtype=torch.bfloat16))
    keep("kn_gpt2", edited(GPT2, "kn", (0, 1)))
    keep("ultraedit_llama_state", edited(LLAMA, UltraEditConfig(layers=[3, 4]), (0, 2), (2, 2)))
    keep("malmen_gpt2", edited(GPT2, "malmen", (0, 1)))
    keep("grace_gpt2", edited(GPT2, "grace", (0, 2)))
    keep("melo_llama", edited(LLAMA, "melo", (0, 2)))
    keep("defer_llama", edited(LLAMA, "defer", (0, 1)))
    keep("t_patcher_gpt2", edited(GPT2, "t-patcher", (0, 1)))
    keep("calinet_gpt2", edited(GPT2, "calinet", (0, 1)))
    keep("wise_gpt2", edited(GPT2, "wise", (0, 1)))
    keep("ike_llama", edited(LLAMA, "ike", (0, 2)))
    keep("prompt_gpt2", edited(GPT2, "prompt", (0, 2)))
    keep("serac_gpt2", edited(GPT2, "serac", (0, 1)))

    untied = edited(GPT2, GRACEConfig(), (0, 1), untie=True)
    keep("grace_gpt2_untied", untied)

    packs = edited(GPT2, "rome", (6, 1))
    packs.load_edits(root / "rome_gpt2")
    packs.set_method(MEMITConfig(layers=[3]))
    packs.edit(facts(7, 2), show_progress=False)
    keep("packs_gpt2", packs)

    exported = edited(LLAMA, "rome", (0, 2))
    exported.export_lora(root / "exported_lora_llama")
    prompts = [e.request.filled_prompt for e in exported.edits]
    said["exported_lora_llama"] = {"base": LLAMA, "ids": [e.id for e in exported.edits], **expected(exported, prompts)}
    (root / "expected.json").write_text(json.dumps(said, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
