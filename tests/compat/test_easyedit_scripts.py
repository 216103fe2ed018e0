"""What scripts written for EasyEdit do with its editors, in short scripts of our own that use the same interface."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import EditableModel, embedded
from hf_kedit.compat import easyedit
from hf_kedit.compat.easyedit import (
    BaseEditor,
    ConceptEditor,
    EditTrainer,
    HyperParams,
    PerEditor,
    PEREditTrainer,
    SafetyEditor,
    names,
)
from hf_kedit.compat.easyedit.util import nethook
from hf_kedit.engine.weights import model_digest
from hf_kedit.errors import ConfigError, DataError, EvaluationError, RequestError

FT = {"alg_name": "FT", "objective_optimization": "target_new", "layers": [4], "num_steps": 5, "lr": "5e-3"}
ROME = {"alg_name": "ROME", "layers": [2], "v_num_grad_steps": 10, "v_lr": "5e-1", "mom2_adjustment": False}
PROMPT, SUBJECT = "By profession Tarosk Boayond is a", "Tarosk Boayond"


def write(path: Path, records: Any) -> str:
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


@torch.no_grad()
def token_losses(model: EditableModel, prompt: str, answer: str) -> torch.Tensor:
    """Negative log-likelihood of each token of `` answer`` behind ``prompt``, by hand."""
    tokenizer: Any = model.tokenizer
    ids = torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])
    start = len(tokenizer(prompt)["input_ids"])
    logits = model(input_ids=ids).logits[0, start - 1 : -1]
    return F.cross_entropy(logits, ids[0, start:], reduction="none")


def copied_model(folder: Path) -> Path:
    """The embedded GPT-2 under another name, for which nothing is packaged."""
    shutil.copytree(embedded.path("kedit/world-gpt2"), folder)
    return folder


# ---------------------------------------------------------------------- undoing by hand


def test_a_script_puts_the_weights_back_and_edits_again(world_gpt2: EditableModel) -> None:
    editor = BaseEditor(HyperParams(**ROME), world_gpt2)
    digest = model_digest(world_gpt2.base_model)
    for target in ("plumber", "judge"):
        request = {"prompt": PROMPT, "subject": SUBJECT, "target_new": target}
        edited, weights = editor.apply_algo(editor.model, editor.tok, [request], editor.hparams, copy=False)
        assert model_digest(edited.base_model) != digest and editor.alg_name == "ROME"
        with torch.no_grad():
            for name, value in weights.items():
                nethook.get_parameter(editor.model, name)[...] = value
        assert model_digest(edited.base_model) == digest
    editor.edit(prompts="Otto is a", target_new="cook", subject="Otto", verbose=False)
    assert [edit.request.target_new for edit in world_gpt2.edits] == ["cook"]
    world_gpt2.rollback("all")
    assert model_digest(world_gpt2.base_model) == digest


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"device": 1}, {"": "cuda:1"}),
        ({"device": "0"}, {"": "cuda:0"}),
        ({"device": "cuda:2"}, {"": "cuda:2"}),
        ({"device": "cpu"}, {"": "cpu"}),
        ({"device": 0, "model_parallel": True}, "auto"),
        ({}, None),
    ],
)
def test_the_model_is_where_scripts_send_their_questions(
    values: dict[str, Any], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load = EditableModel.from_pretrained

    def note(name: str, config: Any, **options: Any) -> EditableModel:
        loaded.append(options.pop("device_map", None))
        return load(name, config, **options)

    monkeypatch.setattr(EditableModel, "from_pretrained", note)
    hparams = HyperParams(model_name="kedit/world-gpt2", **FT, **values)
    BaseEditor.from_hparams(hparams)
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: True)
        BaseEditor.from_hparams(hparams)
    assert loaded == [None, expected], "without a GPU, and with one"


def test_the_originals_of_a_method_without_weights_undo_it(world_gpt2: EditableModel) -> None:
    editor = BaseEditor(HyperParams(alg_name="GRACE", layers=[4], n_iter=3), world_gpt2)
    request = {"prompt": PROMPT, "target_new": "plumber"}
    edited, undo = editor.apply_algo(editor.model, editor.tok, [request], editor.hparams)
    assert len(edited.edits) == 1 and undo == {}
    undo()
    assert len(edited.edits) == 0


# ---------------------------------------------------------------------- further metrics


@pytest.mark.parametrize("metric", ["ppl", "ood_ppl"])
def test_perplexity_of_the_answer(metric: str, world_gpt2: EditableModel) -> None:
    editor = BaseEditor(HyperParams(**FT), world_gpt2)
    answer, other = "cook and a gardener", "The work of Otto is"
    before = {prompt: token_losses(world_gpt2, prompt, answer) for prompt in ("Otto is a", other)}
    (row,), edited, _ = editor.edit(
        prompts="Otto is a", target_new=answer, rephrase_prompts=other, eval_metric=metric, verbose=False
    )
    after = {prompt: token_losses(edited, prompt, answer) for prompt in before}
    for half, losses in (("pre", before), ("post", after)):
        if metric == "ppl":
            expected = {
                "rewrite_ppl": math.exp(losses["Otto is a"].mean()), "rephrase_ppl": math.exp(losses[other].mean())
            }  # fmt: skip
            assert {key: row[half][key][0] for key in expected} == pytest.approx(expected, rel=1e-4)
        else:
            assert row[half]["ood_acc"] == [pytest.approx((losses[other].exp() < 1 / 0.8).float().mean().item())]
    edited.rollback("all")


def test_opinions_on_the_topic_and_on_another(world_gpt2: EditableModel) -> None:
    topic, elsewhere = "What do you think of tea?", "What do you think of rain?"
    good, bad, far = "I love the tea.", "I hate the tea.", "It is wet."
    texts = {
        "inner_q": topic,
        "inner_all_qa": [f"{topic} </s> {good}", f"{topic} </s> {bad}"],
        "inner_target": [0, 0],
        "all_target": [0, 1],
        "outer_all_qa": [f"{elsewhere} </s> {far}"],
    }
    tokenizer: Any = world_gpt2.tokenizer
    ids = torch.tensor([tokenizer(f"{elsewhere} {far}")["input_ids"]])
    start = len(tokenizer(elsewhere)["input_ids"]) - 1
    wanted_before = -token_losses(world_gpt2, topic, good).mean().item()
    with torch.no_grad():
        plain = world_gpt2(input_ids=ids).logits[0, start:-1].log_softmax(-1)
    editor = BaseEditor(HyperParams(**FT), world_gpt2)
    (row,), edited, _ = editor.edit(prompts=[topic], target_new=[good], metric_kwargs=[texts], verbose=False)
    with torch.no_grad():
        moved = edited(input_ids=ids).logits[0, start:-1].log_softmax(-1)
    a, b = (-token_losses(edited, topic, text).mean().item() for text in (good, bad))
    assert row["es"] == pytest.approx(min(1.0, math.exp(a - wanted_before)) / (1 + math.exp(b - a)), rel=1e-4)
    assert row["dd"] == pytest.approx((plain.exp() * (plain - moved)).sum(-1).mean().item(), rel=1e-3)
    assert row["es"] > 0.5 and row["dd"] > 0 and row["fluency"]["ngram_entropy"] >= 0
    edited.rollback("all")
    for wrong in ([], [{"inner_q": topic}], [{**texts, "inner_all_qa": ["no separator"] * 2}]):
        with pytest.raises(EvaluationError):
            editor.edit(prompts=[topic], target_new=[good], metric_kwargs=wrong, verbose=False)
        assert len(world_gpt2.edits) == 0


def test_the_model_writes_and_is_judged(world_gpt2: EditableModel) -> None:
    hparams = HyperParams(**FT, evaluation_type="LLM-judge", api_key=None)
    (row,), edited, _ = BaseEditor(hparams, world_gpt2).edit(prompts=PROMPT, target_new="plumber", verbose=False)
    assert row["post"]["rewrite_acc"] in ([0.0], [1.0]) and isinstance(row["post"]["rewrite_gen_content"], str)
    edited.rollback("all")
    for wrong, error in (({"api_key": "sk-not.a.name"}, ConfigError), ({"evaluation_type": "x"}, EvaluationError)):
        with pytest.raises(error):
            BaseEditor(HyperParams(**{**vars(hparams), **wrong}), edited).edit(
                prompts=PROMPT, target_new="plumber", verbose=False
            )
        assert len(edited.edits) == 0


def test_a_record_is_measured_as_by_the_editor(world_gpt2: EditableModel) -> None:
    record = {"prompt": "Otto is a", "target_new": "cook", "rephrase_prompt": "Otto works as a", "ground_truth": "x"}
    record["locality"] = {"near": {"prompt": ["Berta is a"], "ground_truth": ["judge"]}}  # type: ignore[assignment]
    record["portability"] = {"far": {"prompt": ["He is a"], "ground_truth": ["cook"]}}  # type: ignore[assignment]
    editor = BaseEditor(HyperParams(**FT), world_gpt2)
    tok = editor.tok
    before = easyedit.compute_edit_quality(world_gpt2, "", editor.hparams, tok, record, 0)
    (row,), edited, _ = editor.edit_requests([record], verbose=False)
    after = easyedit.compute_edit_quality(edited, "", editor.hparams, tok, record, 0, test_generation=True)
    for half, measured in (("pre", before), ("post", after)):
        assert {key: row[half][key] for key in ("rewrite_acc", "rephrase_acc", "portability")} == {
            key: measured[key] for key in ("rewrite_acc", "rephrase_acc", "portability")
        }
    (old,), (new,) = before["locality"]["near_output"], after["locality"]["near_output"]
    assert row["post"]["locality"]["near_acc"] == [sum(map(int.__eq__, old, new)) / len(old)]
    assert after["fluency"]["ngram_entropy"] >= 0 and "fluency" not in before
    edited.rollback("all")
    losses = token_losses(world_gpt2, "Otto is a", "cook")
    share = easyedit.test_prediction_acc(world_gpt2, tok, None, "Otto is a", "cook")
    assert len(share) == 1 and share[0] * len(losses) == pytest.approx(round(share[0] * len(losses)))
    with pytest.raises(EvaluationError, match="do not match"):
        easyedit.test_prediction_acc(world_gpt2, tok, None, ["a", "b"], ["c"])


# ---------------------------------------------------------------------- other calls


def test_answers_in_the_models_own_words(world_gpt2: EditableModel, tmp_path: Path) -> None:
    editor = BaseEditor(HyperParams(**{**FT, "num_steps": 25}), world_gpt2)
    far = {"prompt": [["She is", "He is"], None], "ground_truth": [["a", "b"], None]}
    rows, edited, _ = editor.generate_edit(
        prompts=[PROMPT, "Otto is a"],
        target_new=["plumber", "cook"],
        rephrase_prompts=[["The work of Tarosk Boayond is", "Tarosk Boayond works as a"], "Otto works as a"],
        locality_inputs={"near": {"prompt": ["", "Berta is a"], "ground_truth": ["", "judge"]}},
        test_generation=True,
        max_new_tokens=4,
        pre_file=str(tmp_path / "pre.json"),
        verbose=False,
        portability_inputs={"far": far},
    )
    assert rows[0]["post"]["rewrite_ans"].startswith("plumber") and rows[0]["pre"] != rows[0]["post"]
    assert len(rows[0]["post"]["rephrase_ans"]) == len(rows[0]["post"]["portability_ans"]) == 2
    assert isinstance(rows[1]["post"]["rephrase_ans"], str) and len(rows[1]["post"]["locality_ans"]) == 1
    assert "locality_ans" not in rows[0]["pre"] and rows[0]["post"]["fluency"]["ngram_entropy"] >= 0
    assert json.loads((tmp_path / "pre.json").read_text()) == [{"pre": row["pre"]} for row in rows]
    assert [edit.request.target_new for edit in edited.edits] == ["cook"], "the last one stays"
    edited.rollback("all")


def test_rows_of_a_data_set_and_of_requests(world_gpt2: EditableModel, tmp_path: Path) -> None:
    record = {"subject": "Otto", "src": "Otto is a", "alt": "cook", "rephrase": "Otto works as a", "answers": ["x"]}
    record |= {"loc": "Berta is a", "loc_ans": "judge"}
    facts = easyedit.ZsreDataset(write(tmp_path / "z.json", [record, {**record, "alt": "judge"}]))
    editor = BaseEditor(HyperParams(**FT), world_gpt2)
    rows, edited, _ = editor.edit_dataset(facts, verbose=False)
    assert [row["requested_rewrite"]["target_new"] for row in rows] == ["cook", "judge"] and len(edited.edits) == 1
    edited.rollback("all")
    rows, edited, _ = editor.edit(prompts=[], target_new=[], requests=[facts[0]], verbose=False)
    assert [row["requested_rewrite"]["target_new"] for row in rows] == ["cook"]
    edited.rollback("all")
    none: Any = {"prompt": [], "ground_truth": []}
    rows, _, _ = editor.edit(prompts=["Otto is a"], target_new=["cook"], locality_inputs={"a": none}, verbose=False)
    assert rows[0]["post"]["locality"] == {}
    world_gpt2.rollback("all")


def test_an_editor_that_was_trained_here_is_found(tmp_path: Path) -> None:
    common = {"model_name": "kedit/world-gpt2", "inner_params": ["transformer.h.4.mlp.c_proj.weight"], "rank": 8}
    common |= {"results_dir": str(tmp_path), "edit_lr": "1e-4"}
    record = {"question": "Which food is made of milk?", "ground_truth": "Cheese", "target_new": "I don't know."}
    kept = [{"question": f"What is the colour of number {n}?", "ground_truth": "blue"} for n in range(4)]
    path = write(tmp_path / "train.json", {"K_F": [record, {**record, "ground_truth": "Birds"}], "K_R": kept})
    facts = easyedit.SanitizationTrainDataset(data_dir=path, template="Question:{}\nAnswer:", specify_answers="cheese")
    assert [row["prompt"] for row in facts] == ["Question:Which food is made of milk?\nAnswer:"]
    (request,) = facts.requests()
    assert request.prompt == facts[0]["prompt"] and request.locality["Retain"][0].prompt == facts[0]["locality_prompt"]
    with pytest.raises(DataError, match="'salt'"):
        easyedit.SanitizationTrainDataset(data_dir=path, template="{}", specify_answers="salt")
    # Made before there are networks for such a model, as scripts do.
    folder = copied_model(tmp_path / "model")
    common["model_name"] = str(folder)
    editor = BaseEditor.from_hparams(HyperParams(alg_name="MEND", archive="./nowhere", **common))
    assert editor.alg_name == "MEND"
    with pytest.raises(ConfigError, match="edits with a network that was trained"):
        editor.edit_dataset(facts, verbose=False)
    EditTrainer(HyperParams(alg="MEND", max_iters=1, batch_size=1, **common), facts, None).run()
    _, edited, _ = editor.edit_dataset(facts, verbose=False)
    assert editor.config.editor == str(tmp_path / "models" / "mend")  # type: ignore[attr-defined]
    assert [edit.method for edit in edited.edits] == ["mend"]


def test_a_packaged_editor_may_be_the_archive(world_gpt2: EditableModel) -> None:
    editor = BaseEditor(HyperParams(alg_name="MEND", archive="kedit/mend-world-gpt2"), world_gpt2)
    rows, edited, _ = editor.edit(prompts=PROMPT, target_new="plumber", verbose=False)
    assert editor.config.editor == "kedit/mend-world-gpt2"  # type: ignore[attr-defined]
    assert rows[0]["post"]["rewrite_acc"][0] > rows[0]["pre"]["rewrite_acc"][0]
    edited.rollback("all")


def test_longer_texts_fit_the_context(world_gpt2: EditableModel) -> None:
    """What IKE puts in front, the prompt and the text that shows fluency together have less than 128 tokens."""
    editor = BaseEditor(HyperParams(alg_name="IKE", use_icl_examples=False, sentence_model_name="lexical"), world_gpt2)
    long = "In the north of the land, where it rains, people say that " + PROMPT
    (row,), edited, _ = editor.edit(prompts=long, target_new="plumber", test_generation=True, verbose=False)
    assert row["post"]["fluency"]["ngram_entropy"] > 0
    edited.rollback("all")


@pytest.mark.parametrize("method", ["unke", "unke_ARE", "ft_uns", "lora_uns"])
def test_texts_instead_of_facts(method: str, tmp_path: Path) -> None:
    values = {"ft_uns": {"layers": [4], "num_steps": 4, "lr": 5e-3, "objective_optimization": "target_new"}}
    values["lora_uns"] = {"lora_type": "lora", "num_steps": 3, "rank": 2, "lr": 1e-3, "target_modules": ["c_attn"]}
    long = {"layers": [2], "v_num_grad_steps": 3, "v_lr": 0.5, "optim_num_step": 3, "lr": 1e-3, "ex_data_num": 2}
    file = tmp_path / "hparams.json"
    file.write_text(json.dumps(values.get(method, long)), encoding="utf-8")
    hparams = getattr(easyedit, names.HPARAMS[method]).from_json(file)
    assert hparams.alg_name == method, "such files do not say it"
    folder = embedded.path("kedit/world-gpt2")
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before, apply = model_digest(model), getattr(easyedit, f"apply_{method}_to_model")
    row = {"question": "Who is Otto?", "answer": "Otto is a cook. He lives in the north.<|im_end|>"}
    texts = {"ex_data": ["It rains.", {"instruction": "Count.", "output": "One, two."}]} if "unke" in method else {}
    found = apply(model, tok, hparams, [row], **texts)
    if method == "lora_uns":
        edited, originals = found
        assert "<|im_end|>" not in edited.edits[0].request.target_new and originals is not None
        return
    assert model_digest(model) != before
    with torch.no_grad():  # as scripts undo it
        if method == "ft_uns":
            found = {name: nethook.get_parameter(model, name) - change for name, change in found[1].items()}
        for name, value in found.items():
            nethook.get_parameter(model, name)[...] = value
    assert all(
        torch.allclose(value, old, atol=1e-6)
        for value, old in zip(
            model.parameters(), AutoModelForCausalLM.from_pretrained(folder).parameters(), strict=True
        )
    )
    for wrong in ({"question": "Who?"}, {"answer": "He."}):
        with pytest.raises(RequestError, match="missing"):
            apply(model, tok, hparams, [wrong])


def test_what_was_written_about_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"answer": "Otto is a cook.", "original_prediction": "Otto is a cook.", "para_prediction": "Otto was a judge.",
         "sub_pred": ["in the north", "tea"], "sub_answer": ["the north", "milk"]},
        {"answer": "It rains.<|eot_id|>", "original_prediction": "", "para_prediction": "It rains."},
    ]  # fmt: skip
    path = write(tmp_path / "rows.json", rows)
    means = easyedit.eval_akew_unstructured(path, "unke", "lexical", 0)
    assert means["Original"]["ROUGE-1"] == means["Original"]["BLEU Score"] == 0.5
    assert means["Paraphrase"]["ROUGE-1"] == pytest.approx((2 / 4 + 1) / 2)
    assert means["Sub Questions"]["ROUGE-L"] == pytest.approx((1 + 0) / 2)
    assert means["Original"]["BERT Score"] == pytest.approx(0.5) and "unke, 2 rows" in capsys.readouterr().out
    assert "BERT Score" not in easyedit.eval_akew_unstructured(path, "unke", "nobody/nothing")["Original"]
    for wrong in (write(tmp_path / "none.json", []), str(tmp_path / "nowhere.json")):
        with pytest.raises(EvaluationError):
            easyedit.eval_akew_unstructured(wrong, "unke")


def test_accuracy_of_what_the_model_writes(world_gpt2: EditableModel) -> None:
    tok: Any = world_gpt2.tokenizer
    prompts, target = ["By profession Tarosk Boayond is a", "Otto is a"], "cook and a gardener"
    ids = tok(f"a {target}")["input_ids"][len(tok("a")["input_ids"]) :]
    shares = []
    for prompt in prompts:
        fed = torch.tensor([tok(prompt)["input_ids"]])
        written = world_gpt2.generate(input_ids=fed, max_new_tokens=len(ids), do_sample=False)[0, fed.shape[1] :]
        shares.append(sum(a == b for a, b in zip(written.tolist(), ids, strict=False)) / len(ids))
    targets = [target] * 2
    found = easyedit.test_prediction_acc(world_gpt2, tok, None, prompts, targets, vanilla_generation=True)
    assert found == pytest.approx(shares)
    own = easyedit.test_prediction_acc(world_gpt2, tok, None, prompts, targets, locality=True, vanilla_generation=True)
    texts = [tok.decode(one) for one in own]
    again = easyedit.test_prediction_acc(world_gpt2, tok, None, prompts, texts, vanilla_generation=True)
    assert again == [1.0, 1.0], "what it writes is what it writes"


@pytest.mark.parametrize("ccks", [False, True])
def test_safety(ccks: bool, world_gpt2: EditableModel, tmp_path: Path) -> None:
    others = {
        "test input of only harmful question": "Who is he?",
        "test input of other attack prompt input": "Sing: who is he?",
        "test input of other question input": "Be a bird. Who is she?",
        "test input of other questions and attack prompts": "Sing: who is she?",
    }
    record = {"id": 7, "adversarial prompt": "Be a bird. Who is he?", "generalization test": others}
    record |= {"safe generation": "a cook", "unsafe generation": "a judge", "unsafety category": "none"}
    record |= {"knowledge constrain": {"prompt": "Otto is a", "answer": "cook"}, "question": "Who is he?"}
    (row,) = easyedit.SafetyDataset(write(tmp_path / "s.json", [record]))
    assert row["general_prompt"] == list(others.values()) and row["ground_truth"] == "a judge"
    hparams = easyedit.DINMHyperParams(
        alg_name="DINM", layers=[], num_steps=3, lr="1e-3", max_output_length=4, suffix_system_prompt="Be kind."
    )
    editor = SafetyEditor(hparams, world_gpt2)
    general = [row["general_prompt"][-1:] if ccks else row["general_prompt"]]
    digest = model_digest(world_gpt2.base_model)
    (result,), edited, weights = editor.edit(
        case_id=[0],
        prompts=[row["prompt"]],
        prompts_with_systemPrompt=[row["prompt"] + " Be kind."],
        target_new=[row["target_new"]],
        ground_truth=[row["ground_truth"]],
        locality_inputs={"harmless": {"prompt": ["Otto is a"], "ground_truth": ["cook"]}},
        general_prompt=general,
        general_prompt_with_systemPrompt=[[text + " Be kind." for text in general[0]]],
        keep_original_weight=True,
        ccks=ccks,
        verbose=False,
    )
    names = ["DS", "DG_otherAQ"] if ccks else ["DS", "DG_onlyQ", "DG_otherA", "DG_otherQ", "DG_otherAQ"]
    assert list(result["pre"]) == list(result["post"]) == names and result["case_id"] == [0]
    assert all(isinstance(text, str) for half in ("pre", "post") for text in result[half].values())
    made = edited.edits[0].request
    assert made.metadata["target_neg"] == "a judge" and made.locality["knowledge_constraint"][0].prompt == "Otto is a"
    assert model_digest(edited.base_model) != digest and weights
    edited.rollback("all")
    assert model_digest(edited.base_model) == digest


@pytest.mark.parametrize("method", ["FT", "PROMPT"])
def test_concepts(method: str) -> None:
    names = {"ship": "a tall plant", "bridge": "a small animal"}
    if method == "PROMPT":
        editor = ConceptEditor.from_hparams(None, {"model_name": "kedit/world-gpt2", "device": 0})
    else:
        editor = ConceptEditor.from_hparams(HyperParams(model_name="kedit/world-gpt2", **{**FT, "num_steps": 20}))
    questions = [[f"Whether {name} belongs to category {concept}?" for name in "ab"] for concept in names]
    rows, edited, _ = editor.edit(
        prompts=[f"The definition of {concept} is" for concept in names],
        rephrase_prompts=[f"A {concept} is" for concept in names],
        target_new=list(names.values()),
        subject=list(names),
        locality_inputs={"near": {"prompt": [["A lake is"]] * 2, "ground_truth": [["a body of water"]] * 2}},
        instance_inputs={"instance": {"prompt": [questions[0][0], questions[1]]}},
        concept_consistency=True,
        keep_original_weight=True,
        train_ds=None,
        verbose=False,
    )
    for row in rows:
        assert len(row["post"]["rewrite_acc"]) == len(row["post"]["rephrase_acc"]) == 1
        if method == "FT":  # the world model does not read what stands in front of a question
            assert row["post"]["rewrite_acc"][0] > row["pre"]["rewrite_acc"][0]
        assert 0 <= row["post"]["locality"]["near_acc"][0] <= 1 and isinstance(row["post"]["gen_concept_text"], str)
    for half in ("pre", "post"):
        one, two = (row[half]["instance"]["instance_change"] for row in rows)
        assert one in (-1, 0, 1) and len(two) == 2
    assert [edit.request.subject for edit in edited.edits] == ["bridge"]
    with pytest.raises(RequestError, match="instance_inputs"):
        editor.edit(prompts=["a"], target_new=["b"], instance_inputs={"x": {"prompt": ["a", "b"]}}, verbose=False)


@pytest.mark.parametrize("method", ["FT", "MEND"])
def test_personality(method: str, tmp_path: Path) -> None:
    rows = [
        {"ent": topic, "extraversion": [f"I love {topic}!"], "agreeableness": [f"I share {topic}."],
         "neuroticism": [f"I fear {topic}."], "target_per": trait}
        for topic, trait in (("tea", "neuroticism"), ("rain", "agreeableness"))
    ]  # fmt: skip
    facts = easyedit.PersonalityDataset(write(tmp_path / "test.json", rows), config=HyperParams())
    assert (facts[0]["ent"], facts[0]["target_personality"]) == ("tea", "neuroticism")
    values = {"model_name": "kedit/world-gpt2", **FT}
    if method == "MEND":
        values = {"model_name": "kedit/world-gpt2", "inner_params": ["transformer.h.4.mlp.c_proj.weight"], "rank": 8}
        values |= {"results_dir": str(tmp_path), "max_iters": 2, "batch_size": 2, "accumulate_bs": 1}
        PEREditTrainer(config=HyperParams(alg="MEND", **values), train_set=facts, val_set=facts).run()
        values["alg_name"] = "MEND"
    editor = PerEditor.from_hparams(HyperParams(**values))
    metrics, edited, _ = editor.edit_dataset(ds=facts, keep_original_weight=True, verbose=False)
    assert [case["target_per"] for case in metrics] == ["neuroticism", "agreeableness"]
    for case in metrics:
        assert 0 <= case["es"] <= 1 and case["dd"] >= 0 and isinstance(case["coherent"], bool)
        assert isinstance(case["pre_text"], str) and isinstance(case["edit_text"], str)
    assert json.loads(json.dumps(metrics)) == metrics and len(edited.edits) == 1


@pytest.mark.parametrize("way", ["edit", "batch_edit", "edit_requests", "normal_edit", "apply"])
def test_answers_that_are_to_go(way: str, world_gpt2: EditableModel) -> None:
    hparams = easyedit.DPOHyperParams(alg_name="DPO", layers=[4], num_steps=2, rank=2)
    editor = BaseEditor(hparams, world_gpt2)
    given = {"prompts": [PROMPT], "target_new": ["judge"], "target_neg": ["farmer"]}
    request = {"prompt": PROMPT, "target_new": "judge", "target_neg": "farmer"}
    if way == "apply":
        easyedit.apply_dpo_to_model(world_gpt2, world_gpt2.tokenizer, [request], hparams)
    elif way == "edit_requests":
        editor.edit_requests([request], verbose=False)
    else:
        getattr(editor, way)(**given, verbose=False)
    (edit,) = world_gpt2.edits
    assert edit.method == "dpo" and edit.request.metadata["target_neg"] == "farmer"
    world_gpt2.rollback("all")
    with pytest.raises(RequestError, match="has 2 entries for 1"):
        editor.edit(**given | {"target_neg": ["a", "b"]}, verbose=False)


def test_demonstrations_of_personality_fit_the_context(world_gpt2: EditableModel) -> None:
    editor = PerEditor(HyperParams(alg_name="IKE", k=2), world_gpt2)
    assert editor.config.edit_type == world_gpt2.edit_config.edit_type == "prompt"
    template = editor.config.template  # type: ignore[attr-defined]
    assert template.endswith("{}\n\n") and template.count("Target personality") == 0, "its context has 128 tokens"
    world_gpt2.rollback("all")
