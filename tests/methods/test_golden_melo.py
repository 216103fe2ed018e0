"""MELO against another implementation on tiny models: database, blocks, losses, routes, logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kedit import EditableModel, EditRequest
from hf_kedit.methods.melo import NO_BLOCK, Block, BlockDatabase, MELOConfig
from tests.golden_cases import Case
from tests.methods.at_sites import state_at_key

REFERENCE_NO_BLOCK = -100
ACTIONS = {"new": "", "join": "the labels are the same", "split": "the labels are different"}


@pytest.mark.golden
@pytest.mark.parametrize("name", ["melo_gpt2", "melo_llama"])
def test_melo_matches_the_reference(name: str) -> None:
    case = Case(name)
    h: dict[str, Any] = case.spec["hyperparameters"]
    model, tokenizer = case.load()
    path, rank = h["grace_layer"], h["num_rank_per_block"]
    config = MELOConfig(
        layers=[int(next(p for p in path.split(".") if p.isdigit()))],
        module=path,
        stop_probability=None,
        target_modules=h["target_modules"],
        num_blocks=h["num_block"],
        rank=rank,
        radius=h["init_radius"],
        num_steps=h["num_iter"],
        lr=h["edit_lr"],
    )
    editable = EditableModel(model, config, tokenizer)

    def initial(target: str, block: int) -> Block:  # random in the reference
        columns = slice(block * rank, (block + 1) * rank)
        return Block(case.expected[f"init/{target}/A"][:, columns], case.expected[f"init/{target}/B"][columns])

    editable._method.initial_block = initial  # type: ignore[attr-defined]
    for number, (requests, log) in enumerate(zip(case.spec["requests"], case.spec["edits"], strict=True)):
        editable.trace = {}
        edits = editable.edit([EditRequest(**r) for r in requests]).edits
        (database,) = editable.sites.memories.values()
        assert isinstance(database, BlockDatabase)
        assert all(e.diagnostics["block"] == log["block"] for e in edits)
        assert ACTIONS[edits[0].diagnostics["action"]] in "".join(log["messages"])
        case.within(f"edit{number}/query", editable.trace["query"])
        case.within(f"edit{number}/losses", editable.trace["losses"])
        case.within(f"edit{number}/centers", torch.stack([c.center for c in database.clusters]))
        case.within(f"edit{number}/radii", torch.tensor([c.radius for c in database.clusters]))
        found = [[REFERENCE_NO_BLOCK if b == NO_BLOCK else b for b in c.blocks] for c in database.clusters]
        assert found == [c["blocks"] for c in log["clusters"]]
        for target in h["target_modules"]:
            block = database.blocks[log["block"]][target]
            case.within(f"edit{number}/{target}/A_block", block.a)
            case.within(f"edit{number}/{target}/B_block", block.b)
    for number, cluster in enumerate(database.clusters):
        case.within(f"final/cluster{number}/points", cluster.points)
    for number, query in enumerate(case.spec["queries"]):
        ids = torch.tensor([query["prompt_ids"]])
        (route,) = database.route(state_at_key(editable, path, ids, "output")[None]).tolist()
        assert (REFERENCE_NO_BLOCK if route == NO_BLOCK else route) == query["block"]
        with torch.no_grad():
            case.within(f"query{number}/logits", model(ids).logits[0, -1])
            with editable.disable_edits():
                case.within(f"query{number}/unedited_logits", model(ids).logits[0, -1])
