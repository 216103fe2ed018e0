"""IKE, ICE and PROMPT: parity of the texts, and edits that live in front of prompts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline
from transformers.modeling_utils import slice_logits_to_keep

from hf_kedit import (
    AutoMethodConfig,
    EditableModel,
    EditRequest,
    IKEConfig,
    PromptConfig,
    SERACConfig,
    load_edit_dataset,
)
from hf_kedit.books import counterfactuals, retrieval
from hf_kedit.books.prefixed_rows import _fronts
from hf_kedit.books.prefixes import Prefix
from hf_kedit.books.retrieval import EmbeddingRetriever, LexicalRetriever, Passage
from hf_kedit.config import EditConfig
from hf_kedit.data.demonstrations import language_of, packaged_demonstrations
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import (
    ArtifactError,
    BaseModelMismatchError,
    ConfigError,
    MergeError,
    MissingExtraError,
    TargetTooLongError,
    UnsupportedModelError,
)
from hf_kedit.methods import ike
from hf_kedit.tokens import encode_pair
from tests.golden_cases import Case, load_model
from tests.methods.test_family import facts

KINDS = {0: ike.COPY, 1: ike.UPDATE, 2: ike.RETAIN}


def golden() -> Case:
    return Case("ike_text")


def as_request(record: dict[str, Any]) -> EditRequest:
    probes = [{"prompt": record.get("locality_prompt"), "ground_truth": record.get("locality_ground_truth")}]
    return EditRequest(
        prompt=record["prompt"],
        target_new=record["target_new"],
        rephrase_prompts=[record["rephrase_prompt"]] if "rephrase_prompt" in record else [],
        locality={"other": probes} if "locality_prompt" in record else {},
    )


@pytest.mark.golden
def test_sentences_and_their_order_match_easyedit() -> None:
    case = Case("ike_text")
    spec = case.spec
    pool = [as_request(r) for r in spec["demonstrations"]]
    sentences = [s for r in pool for s in ike.demonstrations_of(r).values()]
    assert sentences == spec["stored_sentences"]
    vectors = dict(zip(sentences, case.expected["embeddings"], strict=True))
    vectors[spec["query_sentence"]] = case.expected["query_embedding"]
    retriever = EmbeddingRetriever(lambda texts: torch.stack([vectors[t] for t in texts]), "golden")
    scores = retriever.similarity([spec["query_sentence"]], [Passage(s) for s in sentences], None)[0]
    case.within("scores", scores)
    request = as_request(spec["request"])
    queries = {
        "rewrite": request.filled_prompt,
        "rephrase": request.rephrase_prompts[0],
        "locality": spec["request"]["locality_prompt"],
    }
    for k, expected in spec["retrieval"].items():
        chosen = ike.nearest_sentences(request, pool, retriever, int(k))
        assert chosen == expected["icl_examples"]
        for name, query in queries.items():
            assert ike.build_prompt(request, query, chosen) == spec["final_prompts"][k][name]
    for name, query in queries.items():
        assert ike.build_prompt(request, query) == spec["final_prompts_no_demonstrations"][name]


@pytest.mark.golden
def test_records_and_their_order_match_the_original() -> None:
    spec = golden().spec
    original = spec["original_ike"]
    pool = []
    for record in original["demonstrations"]:
        rewrite = record["requested_rewrite"]
        probe = {"prompt": record["neighborhood_prompts"][0], "ground_truth": rewrite["target_true"]["str"]}
        pool.append(
            EditRequest(
                prompt=rewrite["prompt"],
                subject=rewrite["subject"],
                target_new=rewrite["target_new"]["str"],
                rephrase_prompts=record["paraphrase_prompts"],
                locality={"neighbours": [probe]},
            )
        )
    request = as_request(spec["request"])
    nearest = [pool[i] for i in original["neighbour_order"]]
    chosen = ike.arrange(nearest, [KINDS[k] for k in original["kinds_by_neighbour"]], request)
    assert chosen == original["icl_examples_with_edit"]
    assert ike.build_prompt(request, request.filled_prompt, chosen) == original["rewrite_prompt"]
    dealt = ike.deal_kinds(32, seed=0)
    assert {kind: dealt.count(kind) for kind in ike.SHARES} == ike.SHARES
    assert dealt != ike.deal_kinds(32, seed=1)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_and_logits_behind_a_prefix_match(name: str) -> None:
    """The caller passes prompt and target; what the model reads is the reference's sequence, token by token."""
    case = golden()
    model, tokenizer = load_model(name)
    request = as_request(case.spec["request"])
    editable = EditableModel(model, IKEConfig(k=0), tokenizer)
    editable.edit(request)
    pair = encode_pair(tokenizer, request.filled_prompt, request.target_new)
    for k in (0, 1):
        if k:
            demonstrations = tuple(case.spec["retrieval"]["4"]["icl_examples"][:1])
            (entry,) = editable.prompts.entries
            editable.prompts.restore((replace(entry, demonstrations=demonstrations, nearest_last=False),))
        (prefix,) = editable.prompts.route([request.filled_prompt])
        row, own = editable.prompts.prompter.writer.with_prefix(pair.ids, prefix, model, 0)
        assert row == case.spec["scoring"][f"{name}/k{k}"]["full_text_ids"]
        assert [row[i] for i in own] == pair.ids
        with torch.no_grad():
            logits = editable(input_ids=torch.tensor([pair.ids])).logits[0]
        assert logits.shape[0] == len(pair.ids)
        case.within(f"{name}/k{k}/last_logits_prompt", logits[pair.prompt_length - 1])


# ---------------------------------------------------------------------- edits

PROMPT = "The mother tongue of Mira Halvorsen is"
FACT = EditRequest(prompt="The mother tongue of {} is", subject="Mira Halvorsen", target_new="Swedish", id="a")
OTHER = EditRequest(prompt="{} plays the sport of", subject="Lars Eklund", target_new="tennis", id="b")
OUT_OF_SCOPE = "What instrument does Jun Takeda play? Answer:"


@pytest.fixture(params=["gpt2", "llama"])
def edited(request: pytest.FixtureRequest) -> EditableModel:
    model, tokenizer = load_model(request.param)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    editable = EditableModel(model, PromptConfig(), tokenizer)
    editable.edit([FACT, OTHER])
    return editable


def by_hand(model: EditableModel, request: EditRequest, prompt: str) -> dict[str, torch.Tensor]:
    """Tokens of the whole text, for the model without edits."""
    return model.tokenizer(ike.build_prompt(request, prompt), return_tensors="pt")


def test_a_prompt_in_scope_is_answered_behind_the_fact(edited: EditableModel) -> None:
    own, whole = edited.tokenizer(PROMPT, return_tensors="pt"), by_hand(edited, FACT, PROMPT)
    with torch.no_grad():
        through = edited(**own).logits
        stock = edited.base_model(**own).logits
        with edited.disable_edits():
            without, expected = edited(**own).logits, edited(**whole).logits
    assert through.shape == without.shape and torch.equal(through, stock)
    assert torch.allclose(through[0, -1], expected[0, -1], atol=1e-5)
    assert not torch.allclose(through[0, -1], without[0, -1], atol=1e-2)


def test_prompts_out_of_scope_are_untouched(edited: EditableModel) -> None:
    batch = edited.tokenizer([OUT_OF_SCOPE, "The hometown of Priya Raman is"], return_tensors="pt", padding=True)
    with torch.no_grad():
        through = edited(**batch, use_cache=True)
        with edited.disable_edits():
            plain = edited(**batch, use_cache=True)
    assert torch.equal(through.logits, plain.logits) and through.past_key_values is not None
    tokens = edited.generate(**batch, max_new_tokens=5, do_sample=False)
    with edited.disable_edits():
        assert torch.equal(tokens, edited.generate(**batch, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_mixed_batch_are_the_rows_alone(edited: EditableModel, side: str) -> None:
    texts = [PROMPT, OUT_OF_SCOPE, "Lars Eklund plays the game of"]
    edited.tokenizer.padding_side = side
    batch = edited.tokenizer(texts, return_tensors="pt", padding=True)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = edited(**batch, position_ids=positions).logits
        for i, text in enumerate(texts):
            alone = edited(**edited.tokenizer(text, return_tensors="pt")).logits[0]
            assert torch.allclose(together[i][batch["attention_mask"][i].bool()], alone, atol=1e-4)


def test_logits_that_a_call_does_not_want_are_not_computed(edited: EditableModel) -> None:
    """Whatever ``logits_to_keep`` says; a row behind a prefix has no more logits than the row has."""
    batch = edited.tokenizer(
        [PROMPT, OUT_OF_SCOPE, "Lars Eklund plays the game of"], return_tensors="pt", padding=True
    )
    mask = batch["attention_mask"].bool()
    computed: list[int] = []
    head = edited.base_model.get_output_embeddings()
    head.register_forward_hook(lambda _, given, __: computed.append(given[0].shape[:-1].numel()))
    some = mask & (torch.arange(mask.shape[1]) % 3 != 1)
    width = mask.shape[1]
    with torch.no_grad():
        whole = edited(**batch).logits
        assert sum(computed) == int(mask[[0, 2]].sum()) + width
        for keep in (0, 1, 3, torch.tensor([0, 4, width - 1]), torch.tensor([[5, 0], [1, 2], [width - 1, 4]]), some):
            computed.clear()
            found, expected = edited(**batch, logits_to_keep=keep).logits, slice_logits_to_keep(whole, keep)
            assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
            assert sum(computed) <= expected.shape[:-1].numel()


def test_generation_returns_what_was_passed_in_and_the_continuation(edited: EditableModel) -> None:
    texts = [PROMPT, OUT_OF_SCOPE, "Lars Eklund plays the game of"]
    batch = edited.tokenizer(texts, return_tensors="pt", padding=True)
    width = batch["input_ids"].shape[1]
    greedy = edited.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy[:, :width], batch["input_ids"]) and greedy.shape[1] == width + 4
    with edited.disable_edits():
        for i, (text, fact) in enumerate(zip(texts, [FACT, None, OTHER], strict=True)):
            whole = edited.tokenizer(text, return_tensors="pt") if fact is None else by_hand(edited, fact, text)
            alone = edited.generate(**whole, max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert torch.equal(greedy[i, width:], alone[0, whole["input_ids"].shape[1] :])
    uncached = edited.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(uncached, greedy)
    limited = edited.generate(**batch, max_length=width + 4, do_sample=False, eos_token_id=None)
    assert torch.equal(limited, greedy), "max_length counts what the caller passed in"


def test_beams_and_several_sequences(edited: EditableModel) -> None:
    batch = edited.tokenizer([PROMPT, OUT_OF_SCOPE], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    both = edited.generate(**batch, **settings)
    assert both.shape[0] == 4
    with edited.disable_edits():
        whole = by_hand(edited, FACT, PROMPT)
        alone = edited.generate(**whole, **settings)
    start = batch["input_ids"].shape[1]
    assert torch.equal(both[:2, start:], alone[:, whole["input_ids"].shape[1] :])


def test_the_loss_is_that_of_the_labels(edited: EditableModel) -> None:
    pair = encode_pair(edited.tokenizer, PROMPT, "Swedish")
    ids = torch.tensor([pair.ids])
    labels = ids.clone()
    labels[:, : pair.prompt_length] = -100
    with torch.no_grad():
        output = edited(input_ids=ids, labels=labels)
    log_probs = output.logits[0].log_softmax(-1)
    expected = -torch.stack([log_probs[i - 1, pair.ids[i]] for i in range(pair.prompt_length, len(pair.ids))]).mean()
    assert torch.allclose(output.loss, expected, atol=1e-5)
    with edited.disable_edits(), torch.no_grad():
        plain = edited(input_ids=ids, labels=labels)
    shifted = plain.logits[0].log_softmax(-1)
    target = [-shifted[i - 1, pair.ids[i]] for i in range(pair.prompt_length, len(pair.ids))]
    assert torch.allclose(plain.loss, torch.stack(target).mean(), atol=1e-5)
    assert (plain.loss - output.loss).abs() > 1e-2, "the fact in front of the prompt changes what is said"


def test_in_a_pipeline(edited: EditableModel) -> None:
    generate = pipeline("text-generation", model=edited, tokenizer=edited.tokenizer)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": True}
    text = generate(PROMPT, **settings)[0]["generated_text"]
    ids = edited.generate(**edited.tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert text.startswith(PROMPT) and text == edited.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_records_can_be_deleted_in_any_order(edited: EditableModel) -> None:
    own = edited.tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        before = edited(**own).logits
        edited.rollback("b")
        assert torch.equal(edited(**own).logits, before)
        edited.rollback("a")
        with edited.disable_edits():
            assert torch.equal(edited(**own).logits, edited.base_model(**own).logits)
    assert not {"forward", "generate"} & set(vars(edited.base_model)), "nothing stays on the model"


def test_ids_that_are_given_by_their_place(edited: EditableModel) -> None:
    ids, mask = edited.tokenizer(PROMPT, return_tensors="pt").values()  # type: ignore[misc]
    with torch.no_grad():
        by_name = edited(input_ids=ids, attention_mask=mask).logits
        for model in (edited, edited.base_model):
            for given in ((ids,), (ids, None, mask)):
                assert torch.equal(model(*given).logits, by_name)
        with edited.disable_edits():
            assert not torch.allclose(edited(ids).logits, by_name, atol=1e-3)


def test_the_latest_of_two_facts_about_the_same_counts(edited: EditableModel) -> None:
    edited.edit(prompt=PROMPT, subject="Mira Halvorsen", target_new="Polish", id="c")
    assert edited.build_prompt(PROMPT).startswith(f"New Fact: {PROMPT} Polish\n")
    edited.rollback("c")
    assert edited.build_prompt(PROMPT) == f"New Fact: {PROMPT} Swedish\nPrompt: {PROMPT}"
    assert edited.build_prompt(OUT_OF_SCOPE) == OUT_OF_SCOPE


def test_saved_with_embeddings_and_only_for_its_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = torch.randn(420, 8)
    model, tokenizer = load_model("llama")

    def encode(texts: Any) -> torch.Tensor:
        return torch.stack([table[tokenizer(t)["input_ids"]].mean(0) for t in texts])

    retrieval.register_retriever(EmbeddingRetriever(encode, "table-of-a-test"))
    editable = EditableModel(model, PromptConfig(retriever="table-of-a-test", threshold=0.9), tokenizer)
    editable.edit([FACT, OTHER])
    editable.save_pretrained(tmp_path / "edits")
    own = tokenizer(PROMPT, return_tensors="pt")
    fresh, _ = load_model("llama")
    loaded = EditableModel.from_pretrained(tmp_path / "edits", base_model=fresh, tokenizer=tokenizer)
    with torch.no_grad():
        assert torch.equal(loaded(**own).logits, editable(**own).logits)
    assert torch.equal(loaded.prompts.entries[1].embedding, editable.prompts.entries[1].embedding)
    assert loaded.prompts.entries == editable.prompts.entries

    other = copy.deepcopy(fresh)
    loaded.rollback("all")
    other = load_model("llama")[0]
    with torch.no_grad():
        other.model.norm.weight.mul_(1.01)
    with pytest.raises(BaseModelMismatchError, match="ignore_fingerprint"):
        EditableModel.from_pretrained(tmp_path / "edits", base_model=other, tokenizer=tokenizer)
    del retrieval._REGISTERED["table-of-a-test"]
    with pytest.raises((ConfigError, ArtifactError), match="retriever"):
        EditableModel.from_pretrained(tmp_path / "edits", base_model=load_model("llama")[0], tokenizer=tokenizer)


def test_ike_chooses_demonstrations_and_trims_the_least_similar() -> None:
    model = EditableModel.from_pretrained("kedit/world-gpt2", IKEConfig(demonstrations="world", k=8))
    request = facts(1)[0]
    digest = model_digest(model.base_model)
    model.edit(request)
    assert model_digest(model.base_model) == digest
    (entry,) = model.prompts.entries
    assert len(entry.demonstrations) == 9 and entry.demonstrations[-1] == ike.demonstrations_of(request)[ike.COPY]
    (prefix,) = model.prompts.route([request.filled_prompt])
    ids = model.tokenizer(request.filled_prompt)["input_ids"]
    row, _ = model.prompts.prompter.writer.with_prefix(ids, prefix, model.base_model, 10)
    assert (
        len(row) + 10
        <= model.config.n_positions
        < len(model.tokenizer(model.build_prompt(request.filled_prompt))["input_ids"])
    )
    text = model.tokenizer.decode(row)
    assert entry.fact in text and entry.demonstrations[0] not in text and entry.demonstrations[-1] in text
    with pytest.raises(TargetTooLongError, match="context"):
        model.prompts.prompter.writer.with_prefix(ids, prefix, model.base_model, 120)


def test_words_decide_what_belongs_to_a_subject() -> None:
    passage = Passage(PROMPT, "Mira Halvorsen")
    scores = LexicalRetriever().similarity(
        [PROMPT, "Mira Halvorsen grew up speaking", "The mother tongue of Mira Renner is", OUT_OF_SCOPE, "北京是中国"],
        [passage],
    )[:, 0]
    assert scores[0] == pytest.approx(1.0) and scores[1] >= 0.5 > scores[2] > scores[3] == scores[4] == 0
    plain = LexicalRetriever().similarity([PROMPT, "北京"], [Passage(PROMPT), Passage("北京是")])
    assert plain[0, 0] == pytest.approx(1.0) and plain[1, 1] > 0.5 and plain[0, 1] == 0


def test_what_cannot_work_is_said() -> None:
    model, tokenizer = load_model("llama")
    with pytest.raises(ConfigError, match="demonstrations"):
        IKEConfig(demonstrations=[])
    editable = EditableModel(model, IKEConfig(demonstrations="no-such"), tokenizer)
    with pytest.raises(ConfigError, match="demonstrations"):
        editable.edit(FACT)
    editable.set_method(PromptConfig(retriever="no-such"))
    with pytest.raises(ConfigError, match="register_retriever"):
        editable.edit(FACT)
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        editable.set_method(PromptConfig(retriever="sentence-transformers/all-MiniLM-L6-v2"))
        with pytest.raises(MissingExtraError, match="retrieval"):
            editable.edit(FACT)
    editable.set_method(PromptConfig())
    editable.edit(FACT)
    with pytest.raises(MergeError, match="prompts"):
        editable.merge_and_unload()
    with pytest.raises(UnsupportedModelError, match="disable_edits"):
        editable(**tokenizer(PROMPT, return_tensors="pt"), output_hidden_states=True)
    for wrong in ({"template": "none"}, {"layers": [1]}, {"template": "{} {}"}):
        with pytest.raises(ConfigError):
            PromptConfig(**wrong)  # type: ignore[arg-type]


def test_weight_edits_may_lie_beneath_and_are_measured_without_the_prompts() -> None:
    """A weight edit is the same with and without a prompt memory in the model; both count afterwards."""
    request, other = facts(2)
    model = EditableModel.from_pretrained("kedit/world-gpt2", PromptConfig())
    model.edit(request)
    model.set_method("rome")
    model.edit(request.with_id("again"))
    alone = EditableModel.from_pretrained("kedit/world-gpt2", "rome")
    alone.edit(request)
    assert model_digest(model.base_model) == model_digest(alone.base_model)
    assert model.build_prompt(request.filled_prompt) != request.filled_prompt
    model.set_method("grace")
    with pytest.raises(UnsupportedModelError, match="cannot carry both"):
        model.edit(other)
    model.rollback("all")
    model.edit(other)
    model.set_method("prompt")
    with pytest.raises(UnsupportedModelError, match="cannot carry both"):
        model.edit(request)


# ---------------------------------------------------------------------- without anything given


def test_packaged_demonstrations_are_of_the_edits_language() -> None:
    for language, (edit, other) in {
        "en": (EditRequest(prompt="The capital of Peru is", target_new="Cusco", subject="Peru"), "的"),
        "zh": (EditRequest(prompt="秘鲁的首都是", target_new="库斯科", subject="秘鲁"), " the "),
    }.items():
        rows = packaged_demonstrations(language)
        assert 30 <= len(rows) <= 60 and len({r.filled_prompt for r in rows}) == len(rows)
        for row in rows:
            texts = ike.demonstrations_of(row)
            assert set(texts) == {ike.COPY, ike.UPDATE, ike.RETAIN} and row.subject in row.filled_prompt
            assert not any(other in text.removeprefix("New Fact: ").replace("Prompt: ", "") for text in texts.values())
        assert language_of(edit.filled_prompt) == language
        assert load_edit_dataset(f"demonstrations/{language}").num_rows == len(rows)
    assert language_of("日本人は日本で") == "en" and language_of("서울 漢字") == "en"


def test_ike_works_as_it_is_and_says_what_it_reached(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_kedit.logging._said", set())
    model, tokenizer = load_model("gpt2")
    editable = EditableModel(model, IKEConfig(k=2), tokenizer)
    edit = EditRequest(prompt="The capital of Ireland is", target_new="Cork", subject="Ireland")
    (made,) = editable.edit(edit).edits
    (entry,) = editable.prompts.entries
    assert made.diagnostics["demonstrations"] == len(entry.demonstrations) == 3
    assert not any("Ireland" in text for text in entry.demonstrations[:-1]), "nothing else about the edit's subject"

    def probability(front: str) -> float:
        """Geometric mean of the target's tokens, by a forward of the plain text."""
        with editable.disable_edits(), torch.no_grad():
            ids = tokenizer(front + edit.prompt + " Cork", return_tensors="pt").input_ids
            start = tokenizer(front + edit.prompt, return_tensors="pt").input_ids.shape[1]
            losses = -model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :, 0]
        return float((-losses.mean()).exp())

    assert made.diagnostics["target_probability_before"] == pytest.approx(probability(""), rel=1e-4)
    fronts = ["".join(entry.demonstrations[n:]) + entry.fact for n in range(4)]  # the least similar go first
    room = model.config.n_positions + 1  # the last token of the target is not read
    behind = next(f for f in fronts if len(tokenizer(f + edit.prompt + " Cork").input_ids) <= room)
    assert made.diagnostics["target_probability_after"] == pytest.approx(probability(behind), rel=1e-4)
    assert made.diagnostics["target_probability_after"] < 0.5 and "does not believe its context" in caplog.text
    editable.rollback("all")
    editable.set_method(PromptConfig(threshold=0.1))
    (made,) = editable.edit(edit).edits
    assert 0 < made.diagnostics["target_probability_after"] < 1


AUTO: dict[str, Any] = {
    "encoder": "words",
    "base": {"edit_type": "rome", "v_num_grad_steps": 1, "context_templates": ["{}"], "mom2_adjustment": False},
}


@pytest.mark.parametrize(
    "config",
    [
        PromptConfig(),
        IKEConfig(k=2),
        SERACConfig(scope="lexical", counterfactual="base"),
        SERACConfig(scope="lexical", counterfactual="a reader with half the context"),
        AutoMethodConfig(**AUTO, in_context=True),
        AutoMethodConfig(encoder="words", base="prompt"),
        AutoMethodConfig(**AUTO, base_unnamed="prompt"),
    ],
    ids=["PROMPT", "IKE", "SERAC", "SERAC with a reader", "auto in context", "auto PROMPT", "auto unnamed"],
)
def test_a_fact_that_leaves_no_room_for_its_own_prompt_is_refused_before_anything_is_computed(
    config: EditConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 128
    if isinstance(config, SERACConfig) and config.counterfactual != "base":
        other = EditableModel.from_pretrained("kedit/world-gpt2", "prompt").base_model
        limit = other.config.n_positions = 64
        monkeypatch.setitem(counterfactuals._REGISTERED, config.counterfactual, other)
    editable = EditableModel.from_pretrained("kedit/world-gpt2", config)
    fits = {"prompt": "By profession {} is a", "subject": "Tarosk Boayond", "target_new": "plumber"}
    long = {**fits, "prompt": "very " * (limit // 3) + fits["prompt"]}
    assert limit / 2 < len(editable.tokenizer(long["prompt"])["input_ids"]) < limit  # alone it fits

    def computed(*_: Any) -> Any:
        raise AssertionError("it is refused before")

    monkeypatch.setattr(type(editable._method), "compute", computed)
    with pytest.raises(TargetTooLongError, match=f"row 1.*the new fact with the prompt takes .*context has {limit}"):
        editable.edit([fits, long], batch_size=1, on_error="skip")
    assert editable.edits == [] and not any(book.edit_ids for book in editable.books.values())


def test_where_space_is_short_the_least_similar_demonstration_goes_first() -> None:
    """``order="records"`` puts the most similar one last, ``order="sentences"`` first."""
    shown = ("a ", "b ", "c ")
    last = [text for _, text in _fronts(Prefix("fact ", shown, nearest_last=True))]
    first = [text for _, text in _fronts(Prefix("fact ", shown, nearest_last=False))]
    assert last == ["a b c fact ", "b c fact ", "c fact ", "fact "]
    assert first == ["a b c fact ", "a b fact ", "a fact ", "fact "]
    request = facts(1)[0]
    for order in ("sentences", "records"):
        model = EditableModel.from_pretrained("kedit/world-gpt2", IKEConfig(demonstrations="world", k=8, order=order))
        model.edit(request)
        (entry,) = model.prompts.entries
        (prefix,) = model.prompts.route([request.filled_prompt])
        assert prefix is not None and prefix.nearest_last == (order == "records")
        ids = model.tokenizer(request.filled_prompt)["input_ids"]  # type: ignore[misc]
        row, _ = model.prompts.prompter.writer.with_prefix(ids, prefix, model.base_model, 10)
        kept = [d.strip() in model.tokenizer.decode(row) for d in entry.demonstrations]  # type: ignore[union-attr]
        assert not all(kept), "the context is too short for all of them"
        dropped = kept.index(False) if order == "sentences" else len(kept) - kept[::-1].index(False)
        assert all(kept[:dropped]) if order == "sentences" else all(kept[dropped:])
        assert kept[0 if order == "sentences" else -1]
