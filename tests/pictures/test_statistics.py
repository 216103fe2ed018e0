"""Second moments over rows with pictures: by hand, named by their content, kept in the cache, used by an edit."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_kedit import EditableModel, EditRequest
from hf_kedit.anatomy import resolve_anatomy
from hf_kedit.errors import DataError
from hf_kedit.loading import embedded_corpus, load_base, load_processor
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import Corpus, plain_texts, resolve_corpus
from hf_kedit.text.pictures import Picture, PicturedText
from tests.pictures.test_edits import FACTS, TEXTS, editable
from tests.seeing import picture, seeing

ROWS: list[Any] = [
    "a text of its own.",
    {"text": "a box, and a man.", "image": picture(0)},
    {"text": "two cats.", "image": picture(1, 56, 30)},
    {"text": "nothing to be seen."},
]


def by_hand(model: Any, processor: Any, path: str, rows: list[Any]) -> tuple[torch.Tensor, int]:
    """Sum of the outer products of what enters a module, one row after another, as transformers itself is asked."""
    total, count, seen = torch.zeros(48, 48, dtype=torch.float64), 0, []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for row in rows:
        text, image = (row, None) if isinstance(row, str) else (row["text"], row.get("image"))
        if image is None:
            given = processor.tokenizer(text, return_tensors="pt")
        else:
            prompt = EditRequest(prompt=text, target_new="x", image=image).rendered(None, processor).filled_prompt
            given = processor(images=[image], text=str(prompt), return_tensors="pt")
        with torch.no_grad():
            model(**given)
        keys = seen.pop().reshape(-1, 48).double()
        total, count = total + keys.T @ keys, count + len(keys)
    handle.remove()
    return total, count


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_moments_count_the_keys_of_pictures(family: str) -> None:
    model, processor = seeing(family)
    path = resolve_anatomy(model).down(2).path
    corpus = resolve_corpus(ROWS, processor)
    assert corpus is not None
    found = collect_moments(model, processor.tokenizer, [path], corpus, show_progress=False)[path]
    total, count = by_hand(model, processor, path, ROWS)
    assert found.count == count
    assert torch.allclose(found.total, total, rtol=1e-4, atol=1e-4 * float(total.diagonal().max()))
    texts_only, _ = by_hand(model, processor, path, [r if isinstance(r, str) else r["text"] for r in ROWS])
    assert not torch.allclose(found.total, texts_only, rtol=1e-2)


def test_a_text_with_a_picture_is_never_cut() -> None:
    model, processor = seeing("llava")
    path, corpus = resolve_anatomy(model).down(2).path, resolve_corpus(ROWS[1:], processor)
    assert corpus is not None
    found = collect_moments(model, processor.tokenizer, [path], corpus, tokens=5, show_progress=False)[path]
    assert found.count == by_hand(model, processor, path, ROWS[1:2])[1]


def test_a_corpus_is_named_by_texts_and_pictures(tmp_path: Path) -> None:
    _, processor = seeing("llava")

    def name(rows: Any) -> str:
        corpus = resolve_corpus(rows, processor)
        assert corpus is not None
        return corpus.name

    other = [*ROWS[:2], {**ROWS[2], "image": picture(2, 56, 30)}, ROWS[3]]
    assert name(ROWS) == name([*ROWS]) and name(ROWS).startswith("rows-")
    assert (
        len({name(ROWS), name(other), name(ROWS[:3]), name([r if isinstance(r, str) else r["text"] for r in ROWS])})
        == 4
    )

    picture(0).save(tmp_path / "a.png")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ({"text": "a box.", "image": "a.png"}, {"text": "no."})))
    corpus, before = resolve_corpus(str(file), processor), name(file)
    assert corpus is not None
    first, second = corpus.texts()
    assert isinstance(first, PicturedText) and first.pictures == (Picture.of(picture(0)),) and second == "no."
    assert str(first).endswith("a box.") and list(plain_texts(corpus)) == ["no."]
    picture(3).save(tmp_path / "a.png")
    assert name(file) != before
    alone = resolve_corpus(ROWS[1:2], processor)
    assert alone is not None and list(plain_texts(alone)) == ["a box, and a man."]


@pytest.mark.parametrize(
    ("row", "sees", "message"),
    [
        ({"image": picture(0)}, True, "row 1.*'text'"),
        ({"text": "a", "image": "missing.png"}, True, r"row 1.*missing\.png"),
        ({"text": "a", "image": 5}, True, "row 1.*PIL"),
        ({"text": "a", "image": picture(0)}, False, "row 1.*no processor"),
        (7, True, "row 1"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row: Any, sees: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_corpus(["fine", row], seeing("llava")[1] if sees else None)


def test_edits_say_which_rows_their_moments_are_of_and_find_them_again(tmp_path: Path) -> None:
    rows = [*TEXTS * 8, *[{"text": "a box.", "image": picture(i)} for i in range(6)]]
    settings: dict[str, Any] = {"stats_dir": str(tmp_path), "stats_tokens": 200}
    model = editable("llava", "memit", **settings)
    corpora: list[Corpus] = [c for c in (resolve_corpus(r, model.processor) for r in (TEXTS * 8, rows)) if c]
    for corpus, given in zip(corpora, (TEXTS * 8, rows), strict=True):
        fresh = EditableModel(seeing("llava")[0], model.edit_config, model.processor, corpus=given)
        result = fresh.edit(**FACTS[1], show_progress=False)
        assert result.edits[0].diagnostics["moments"]["corpus"] == corpus.name
    named = set()
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            named.add(file.metadata()["corpus"])
    assert named == {corpus.name for corpus in corpora}


def test_the_picture_world_is_read_with_its_drawings() -> None:
    model = load_base("kedit/world-pictures")
    processor = load_processor("kedit/world-pictures", model.config)
    corpus, text = (embedded_corpus("kedit/world-pictures", model, p) for p in (processor, None))
    assert corpus is not None and text is not None and corpus.name == "world-pictures-0" != text.name
    rows = list(islice(corpus.texts(), 40))
    assert [isinstance(row, PicturedText) for row in rows] == [False, True] * 20
    assert rows[::2] == list(islice(text.texts(), 20)) == list(islice(plain_texts(corpus), 20))
    assert len({row.pictures for row in rows[1::2]}) > 10  # type: ignore[attr-defined]
    with torch.no_grad():  # what is said of the drawings is what the model knows of them
        right = []
        for row in rows[1::2]:
            assert isinstance(row, PicturedText)
            given = processor(images=[p.image for p in row.pictures], text=str(row), return_tensors="pt")
            right.append(float(model(**given).logits[0, -2].argmax() == given["input_ids"][0, -1]))
    assert sum(right) / len(right) > 0.9
