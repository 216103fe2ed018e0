"""Every name that EasyEdit's example scripts and notebooks import, from the module that they import it from.

The lists hold names alone. Those of the scripts under ``examples/`` were read off their import lines; those of the
notebooks are what such notebooks are known to use.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kedit import EditableModel, embedded
from hf_kedit.compat import easyedit
from hf_kedit.compat.easyedit import BaseEditor, EditTrainer, HyperParams, convert_training, names
from hf_kedit.errors import ConfigError, DataError, KeditError, NoCounterpartError, RequestError
from hf_kedit.training.plan import TrainingPlan

COMMON = "FTHyperParams IKEHyperParams KNHyperParams MEMITHyperParams ROMEHyperParams LoRAHyperParams MENDHyperParams"
NINE = "FTHyperParams GraceHyperParams MEMITHyperParams ROMEHyperParams MENDHyperParams WISEHyperParams BaseEditor"
IKE = {"models.ike": "encode_ike_facts"}
SAFETY = "MENDHyperParams DINMHyperParams SafetyEditor MENDTrainingHparams SafetyDataset EditTrainer n_gram_entropy"
SANITATION = "SERACTrainingHparams MENDTrainingHparams test_generation_quality SanitizationTrainDataset EditTrainer"
PICTURES = (
    "BaseEditor MultimodalTrainer MultimodalEditor CaptionDataset VQADataset MENDMultimodalTrainingHparams"
    " SERACMultimodalTrainingHparams IKEMultimodalHyperParams MENDMultimodalHparams SERACMultimodalHparams"
)

# Script → module below the top ("" is the top) → names.
SCRIPTS: dict[str, dict[str, str]] = {
    "run_AKEW_both": {
        "": "AlphaEditHyperParams FTHyperParams MEMITHyperParams ROMEHyperParams LoRAHyperParams GraceHyperParams"
        " MENDHyperParams BaseEditor AKEWUnifiedDataset",
        "evaluate.evaluate_uns": "eval_akew_unstructured",
        "models.unke": "unkeHyperParams apply_unke_to_model",
        "models.unke_ARE": "unkeAREHyperParams apply_unke_ARE_to_model",
        "models.lora": "LoRAHyperParams apply_lora_to_model",
        "models.lora_uns": "LoRA_uns_HyperParams apply_lora_uns_to_model",
        "models.ft": "FTHyperParams apply_ft_to_model",
        "models.ft_uns": "FT_uns_HyperParams apply_ft_uns_to_model",
        "util": "nethook",
        "util.globals": "*",
    },
    "run_AlphaEdit_editing": {"": f"AlphaEditHyperParams {NINE} summary_metrics"},
    "run_CKnowEdit": {"": f"{COMMON} GraceHyperParams SERACHparams BaseEditor CKnowEditDataset", **IKE},
    "run_Hallueditbench": {"": f"{COMMON} SERACHparams BaseEditor"},
    "run_LLM_evaluation": {"": f"{COMMON} SERACHparams AlphaEditHyperParams BaseEditor KnowEditDataset", **IKE},
    "run_SPHERE_editing": {"": f"AlphaEditHyperParams {NINE} SPHEREHyperParams summary_metrics"},
    "run_SimIE_editing": {"": "SimIEHyperParams BaseEditor summary_metrics"},
    "run_WikiBigEdit": {
        "": "AlphaEditHyperParams FTHyperParams MEMITHyperParams ROMEHyperParams LoRAHyperParams GraceHyperParams"
        " BaseEditor WikiBigEditDataset"
    },
    "run_adsedit": {
        "": f"{PICTURES} WISEMultimodalHyperParams FTHyperParams GraceHyperParams LoRAMultimodalHyperParams"
    },
    "run_akew": {"": f"{COMMON} SERACHparams BaseEditor", **IKE, "dataset.akew": "AKEWDataset"},
    "run_ccks_SafeEdit_gpt2-xl": {"": SAFETY},
    "run_concept_editing": {"": "FTHyperParams MEMITHyperParams ROMEHyperParams HyperParams ConceptEditor"},
    "run_convsent_llama2": {"": f"{COMMON} SERACHparams BaseEditor ZsreDataset", **IKE},
    "run_counterfact": {
        "": f"{COMMON} SERACHparams BaseEditor",
        **IKE,
        "dataset.counterfact": "CounterFactDataset",
    },
    "run_knowedit_llama2": {"": f"{COMMON} SERACHparams BaseEditor KnowEditDataset", **IKE},
    "run_longform": {
        "": "AlphaEditHyperParams FTHyperParams MEMITHyperParams ROMEHyperParams LoRAHyperParams GraceHyperParams"
        " MENDHyperParams BaseEditor LongFormEditDataset"
    },
    "run_personality_editing": {
        "": "PEREditTrainer MENDTrainingHparams MENDHyperParams PersonalityDataset IKEHyperParams PerEditor"
    },
    "run_real-world_evaluation": {"": f"{NINE} summary_metrics"},
    "run_safety_editing": {"": SAFETY},
    "run_santinization_llama2": {"": f"{COMMON} SERACHparams BaseEditor {SANITATION}", **IKE},
    "run_ultraedit_editing": {"": f"AlphaEditHyperParams {NINE} UltraEditHyperParams summary_metrics"},
    "run_wise_editing": {"": f"{NINE} summary_metrics"},
    "run_zsre_llama2": {"": "FTHyperParams IKEHyperParams KNHyperParams MEMITHyperParams ROMEHyperParams BaseEditor"},
    "test_InstructEdit": {
        "": f"{COMMON} SERACHparams BaseEditor ZsreDataset WikiRecentDataset",
        **IKE,
        "models.lora": "LoRAHyperParams",
    },
    "qwen38": {
        "": "BaseEditor",
        "models.wise.wise_hparams": "WISEHyperParams",
        "models.ft.ft_hparams": "FTHyperParams",
        "evaluate.evaluate_utils": "test_prediction_acc",
        "util.model_loader": "is_qwen35_vl_text_model load_qwen35_language_model",
    },
}
NOTEBOOKS: dict[str, dict[str, str]] = {
    "AlphaEdit_llama": {"": "BaseEditor AlphaEditHyperParams"},
    "FT": {"": "BaseEditor FTHyperParams"},
    "IKE": {
        "": "BaseEditor IKEHyperParams CounterFactDataset ZsreDataset",
        "models.ike.util": "encode_ike_facts",
        "models.ike": "encode_ike_facts",
    },
    "KN_T5": {"": "BaseEditor KNHyperParams"},
    "LoRA": {"": "BaseEditor LoRAHyperParams"},
    "QLoRA": {"": "BaseEditor QLoRAHyperParams"},
    "MEMIT": {"": "BaseEditor MEMITHyperParams"},
    "Multimodal_IKE": {"": f"{PICTURES} encode_ike_facts_multimodal"},
    "ROME": {"": "BaseEditor ROMEHyperParams"},
    "US_President": {"": "BaseEditor WISEHyperParams AlphaEditHyperParams LoRAHyperParams"},
    "WISE": {"": "BaseEditor WISEHyperParams"},
}
# What others' public scripts take from deeper down.
DEEPER = {
    "models.memit": "apply_memit_to_model memit_main",
    "models.rome.rome_main": "apply_rome_to_model",
    "models.rome.layer_stats": "layer_stats",
    "models.rome": "layer_stats",
    "models.alphaedit.AlphaEdit_hparams": "AlphaEditHyperParams",
    "models.kn.knowledge_neurons": "KnowledgeNeurons",
    "models.melo.melo": "LORA",
    "evaluate": "compute_edit_quality compute_icl_edit_quality compute_sent_metric",
    "evaluate.evaluate": "compute_edit_quality compute_rewrite_or_rephrase_quality",
    "editors": "BaseEditor LOG",
    "editors.batch_editor": "BatchEditor",
    "editors.utils": "summary_metrics",
    "trainer": "EditTrainer *",
    "util": "HyperParams",
    "util.hparams": "HyperParams",
    "util.alg_dict": "ALG_DICT *",
    "": "DPOHyperParams DeepEditApiHyperParams FTApiHyperParams KETrainingHparams MALMENTrainingHparams"
    " PMETHyperParams MELOHyperParams",
}


@pytest.mark.parametrize(
    "imports", [*SCRIPTS.values(), *NOTEBOOKS.values(), DEEPER], ids=[*SCRIPTS, *NOTEBOOKS, "deeper"]
)
def test_import_lines_run(imports: dict[str, str]) -> None:
    assert imports
    for module, wanted in imports.items():
        path = ".".join(filter(None, ["hf_kedit.compat.easyedit", module]))
        for name in wanted.split():
            found: dict[str, Any] = {}
            exec(f"from {path} import {name}", found)
            assert name == "*" or found[name] is getattr(importlib.import_module(path), name) or name in names.ABSENT


def test_names_of_the_first_version_stay() -> None:
    first = """
        AlphaEditHyperParams COREHyperParams DINMHyperParams DeferHyperParams EMMETHyperParams FTHyperParams
        GraceHyperParams IKEHyperParams KEHyperParams KNHyperParams LoRAHyperParams MALMENHyperParams
        MELOHyperParams MEMITHyperParams MENDHyperParams PMETHyperParams QLoRAHyperParams
        R_ROMEHyperParams ROMEHyperParams
        SERACHparams SimIEHyperParams TPatcherHyperParams UltraEditHyperParams WISEHyperParams HyperParams
        BaseEditor"""
    for name in first.split():
        assert hasattr(easyedit, name), name


@pytest.mark.parametrize("name", sorted(names.ABSENT))
def test_a_name_without_counterpart_says_what_to_use_instead(name: str) -> None:
    thing = getattr(easyedit, name)
    for use in (lambda: thing(), lambda: thing.from_hparams("x"), lambda: isinstance(1, thing)):
        with pytest.raises(NoCounterpartError, match=name) as raised:
            use()
        assert len(str(raised.value)) > len(name) + 40
    with pytest.raises(NoCounterpartError):
        exec("class Mine(thing): pass", {"thing": thing})


@pytest.mark.parametrize("path", ["nope", "models.instruct_edit", "dataset.processor", "util.nethook.deeper"])
def test_a_module_that_nobody_knows(path: str) -> None:
    """Below every module, whether there is one or not."""
    with pytest.raises(NoCounterpartError, match=f"'{path}' is no module of EasyEdit's.*docs/migrate.md"):
        importlib.import_module(f"hf_kedit.compat.easyedit.{path}")
    with pytest.raises(ModuleNotFoundError):  # what lies elsewhere is not its business
        importlib.import_module(f"hf_kedit.compat.{path}")


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(NoCounterpartError, match="Did you mean 'ROMEHyperParams'"):
        exec("from hf_kedit.compat.easyedit.models import ROMEHyperParam")
    assert not hasattr(easyedit, "_private")
    assert issubclass(NoCounterpartError, KeditError) and issubclass(NoCounterpartError, ImportError)


# ---------------------------------------------------------------------- training files

MEND = {
    "alg": "MEND", "model_name": "kedit/world-gpt2", "model_class": "GPT2LMHeadModel", "archive": None,
    "inner_params": ["transformer.h.4.mlp.c_proj.weight", "transformer.h[5].mlp.c_fc.weight"],
    "lr": "1e-4", "edit_lr": "1e-4", "lr_lr": "1e-4", "seed": 42, "cedit": 0.1, "cloc": 1.0, "cbase": 1.0,
    "n_hidden": 1, "rank": 8, "shared": True, "combine": True, "mlp_class": "IDMLP", "device": "cuda:0",
    "batch_size": 2, "max_iters": 6, "log_interval": 2, "val_interval": 4, "model_save_pt": 4, "half": False,
    "early_stop_patience": 20000, "val_batch_size": 2, "accumulate_bs": 2, "val_steps": 2, "grad_clip": 100.0,
    "results_dir": "./results",
}  # fmt: skip


def test_a_training_file_becomes_a_plan() -> None:
    converted = convert_training(MEND)
    assert converted.plan["model"] == "kedit/world-gpt2" and converted.plan["method"] == "mend"
    assert converted.plan["editor"] == {
        "modules": ["transformer.h.4.mlp.c_proj", "transformer.h.5.mlp.c_fc"],
        "edit_lr": 1e-4, "edit_weight": 0.1, "locality_weight": 1.0, "rank": 8, "shared": True, "combine": True,
    }  # fmt: skip
    assert converted.plan["training"] == {
        "learning_rate": 1e-4, "step_size_lr": 1e-4, "max_grad_norm": 100.0, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "seed": 42,
        "max_steps": 3, "logging_steps": 1, "eval_steps": 2, "save_steps": 2, "eval_strategy": "steps",
        "output_dir": str(Path("results/models/mend")),
    }  # fmt: skip
    assert converted.plan["data"]["eval_size"] == 2 and "dtype" not in converted.plan
    assert {"model_class", "cbase", "mlp_class", "device", "early_stop_patience", "data"} <= converted.ignored.keys()
    assert all(len(reason) > 10 for reason in converted.ignored.values())
    TrainingPlan(**converted.plan).arguments()


@pytest.mark.parametrize(
    ("changes", "method", "expected"),
    [
        ({"alg": "KE", "half": True}, "ke", {"dtype": "bfloat16"}),
        ({"alg": "SERAC", "small_name": "a", "cls_name": "b", "inner_params": []}, "serac", {}),
        ({"alg": "SERAC_MULTI", "name": "facebook/opt-125m", "qformer_checkpoint": "x"}, "serac", {}),
        (
            {"alg": "MALMEN", "edit_lr": None, "lr": "1e-6", "meta_lr": "1e-5", "n_blocks": 3, "token": "mask"},
            "malmen",
            {},
        ),
        ({"n_hidden": 2}, "mend", {}),
    ],
)
def test_training_files_of_every_kind(changes: dict[str, Any], method: str, expected: dict[str, Any]) -> None:
    plan = convert_training({**MEND, **changes}).plan
    assert plan["method"] == method and expected.items() <= plan.items()
    if method == "malmen":
        assert plan["editor"]["edit_lr"] == 1e-6 and plan["training"]["learning_rate"] == 1e-5
        assert plan["editor"]["num_blocks"] == 3 and plan["editor"]["token"] == "attended"
    if method == "serac" and "small_name" in changes:
        assert plan["editor"]["small_model"] == "a" and plan["editor"]["encoder"] == "b"
    if "name" in changes:
        assert plan["model"] == "facebook/opt-125m"
        assert "pictures" in convert_training({**MEND, **changes}).ignored["qformer_checkpoint"]
    if "n_hidden" in changes:
        assert plan["editor"]["num_blocks"] == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alg": "FT"}, "no method whose editor is trained"),
        ({"model_name": None}, "name no model"),
        ({"max_iters": "many"}, "max_iters must be a number"),
        ({"rank": "wide"}, "rank"),
    ],
)
def test_training_files_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_training({**MEND, **values})


# ---------------------------------------------------------------------- data


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(path)


def zsre(count: int) -> list[dict[str, Any]]:
    return [
        {
            "subject": f"Anna {n}", "src": f"What is the work of Anna {n}?", "pred": "cook", "alt": "baker",
            "rephrase": f"Which work does Anna {n} do?", "answers": ["cook"],
            "loc": "nq question: who plays the flute", "loc_ans": "Berta", "cond": "cook >> baker",
        }
        for n in range(count)
    ]  # fmt: skip


def test_rows_have_their_keys(tmp_path: Path) -> None:
    rows = easyedit.ZsreDataset(write(tmp_path / "z.json", zsre(3)), size=2)
    assert len(rows) == 2 and rows[0]["prompt"] == "What is the work of Anna 0?" and rows[1]["case_id"] == 1
    assert rows[0]["target_new"] == "baker" and rows[0]["ground_truth"] == "cook" and rows[0:1] == [rows[0]]
    assert rows[0]["rephrase_prompt"] == "Which work does Anna 0 do?" and rows[0]["locality_ground_truth"] == "Berta"

    probe = [{"prompt": "She lives in", "ground_truth": [["Rome", "Roma"]]}]
    record = {"subject": "Anna", "prompt": "Anna is a", "target_new": "baker", "ground_truth": "cook"}
    record |= {"portability": {"Reasoning": probe}, "locality": {"Relation_Specificity": probe}}
    (row,) = easyedit.KnowEditDataset(write(tmp_path / "k.json", [record]))
    assert row["portability_r"] == [{"prompt": "She lives in", "ground_truth": [["Rome", "Roma"]]}]
    assert row["locality_rs"][0]["ground_truth"][0][0] == "Rome"
    assert row["portability_s"] is None and row["locality_f"] is None

    record = {"prompt": "成语", "target_old": "旧", "target_new": "新", "rephrase": ["问"]}
    record["portability"] = [{"prompt": "甲", "answer": "乙"}]
    (row,) = easyedit.CKnowEditDataset(write(tmp_path / "c.json", [record]))
    assert row["target_old"] == "旧" and row["portability"] == [{"prompt": "甲", "answer": "乙"}]
    assert row["locality"] is None

    record = {
        "update": "Who leads it?",
        "ans": "Berta",
        "subject": "It",
        "rephrase": "Its leader?",
        "personas": "Hey?",
    }
    record |= {"mhop": "Where does she live?", "mhop_ans": "Rome", "loc": "Where is Oslo?", "loc_ans": "Norway"}
    (row,) = easyedit.WikiBigEditDataset(write(tmp_path / "w.json", [record]))
    assert row["prompt"] == "Who leads it?" and row["portability_personas"] == "Hey?" and row["locality"]
    assert (row["portability_hop"], row["portability_hop_ans"]) == ("Where does she live?", "Rome")

    rewrite = {"subject": "Anna", "prompt": "{} is a", "target_new": {"str": "baker"}, "target_true": {"str": "cook"}}
    (row,) = easyedit.CounterFactDataset(write(tmp_path / "f.json", [{"case_id": 0, "requested_rewrite": rewrite}]))
    assert row["prompt"] == "Anna is a" and row["ground_truth"] == "cook"
    paragraph = {**rewrite, "prompt_full": "Anna is a", "fact_new_uns": "Anna bakes.", "question": "Her work?"}
    (row,) = easyedit.AKEWDataset(write(tmp_path / "a.json", [{"requested_rewrite": paragraph}]))
    assert row["descriptive_target"] == "Anna bakes." and row["portability_data"] == ["Her work?"]
    assert (row["portability_answer"], row["locality_data"]) == ("baker", [])
    hops = {"requested_rewrite": [rewrite], "questions": ["Her tool?"], "new_answer": "oven", "answer": "pot"}
    (row,) = easyedit.AKEWDataset(write(tmp_path / "m.json", [hops]))
    assert (row["prompt"], row["portability_data"], row["portability_answer"]) == ("Anna is a", ["Her tool?"], "oven")
    (row,) = easyedit.AKEWUnifiedDataset(tmp_path / "a.json", dataset_type="counterfact")
    assert row["target_new"] == "baker" and row["locality"] == [] and row["rephrase"] == ["Her work?"]
    (tmp_path / "AKEW").mkdir()
    write(tmp_path / "AKEW" / "CounterFact.json", [{"requested_rewrite": paragraph}])
    (row,) = easyedit.AKEWUnifiedDataset(tmp_path, dataset_type="counterfact", use_unstructured_data=True)
    assert row["target_new"] == row["answer"] == "Anna bakes." and row["question"] == "Her work?"
    assert row["sub_question"], "scripts ask something in any case"
    triplets = [{"prompt": "{} has", "subject": "Anna", "target": str(n)} for n in range(7)]
    write(
        tmp_path / "AKEW" / "CounterFact.json",
        [{"requested_rewrite": {**paragraph, "unsfact_triplets_GPT": triplets}}],
    )
    (row,) = easyedit.AKEWUnifiedDataset(
        tmp_path, dataset_type="counterfact", use_unstructured_data=True, model_name="x/Qwen2.5-7B-Instruct"
    )
    assert row["sub_question"] == ["Anna has"] * 5 and row["sub_answer"] == list("01234")
    assert row["answer"] == "Anna bakes.<|im_end|>", "scripts cut such an end off"
    (row,) = easyedit.AKEWDataset(tmp_path / "AKEW" / "CounterFact.json")
    assert row["locality_data"] == triplets
    with pytest.raises(DataError, match="dataset_type"):
        easyedit.AKEWUnifiedDataset(tmp_path / "a.json", dataset_type="novels")
    with pytest.raises(DataError, match="no file"):
        easyedit.ZsreDataset(tmp_path / "nowhere.json")


# ---------------------------------------------------------------------- functions


def test_means_of_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        {"pre": {"rewrite_acc": [0.0]}, "post": {"rewrite_acc": [1.0, 0.0], "locality": {"n_acc": [1.0, 0.5]}}},
        {
            "pre": {"rewrite_acc": [0.5]},
            "post": {"rewrite_acc": [1.0], "locality": {}, "fluency": {"ngram_entropy": 4}},
        },
    ]
    means = easyedit.summary_metrics(cases)
    assert means == {"pre": {"rewrite_acc": 0.25}, "post": {"rewrite_acc": 0.75, "locality": {"n_acc": 0.75}}}
    assert json.loads(capsys.readouterr().out.removeprefix("Metrics Summary: ")) == means
    assert easyedit.n_gram_entropy(["no words"]) == 0.0 < easyedit.n_gram_entropy(["one two three four five"])


def test_one_function_for_every_method() -> None:
    from hf_kedit.compat.easyedit.models.rome.rome_main import apply_rome_to_model
    from hf_kedit.compat.easyedit.util import nethook

    folder = str(embedded.path("kedit/world-gpt2"))
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    request = {"prompt": "By profession Tarosk Boayond is a", "subject": "Tarosk Boayond", "target_new": "plumber"}
    hparams = easyedit.ROMEHyperParams(alg_name="ROME", layers=[2], v_num_grad_steps=20, mom2_adjustment=False)
    name = "transformer.h.2.mlp.c_proj.weight"
    before = nethook.get_parameter(model, name).detach().clone()
    apart, _ = apply_rome_to_model(model, tok, [request], hparams, copy=True)
    assert torch.equal(nethook.get_parameter(model, name), before) and len(apart.edits) == 1
    edited, originals = apply_rome_to_model(model, tok, [request], hparams)
    assert isinstance(edited, EditableModel) and not torch.equal(nethook.get_parameter(model, name), before)
    assert list(originals) == [name] and torch.equal(originals[name], before)
    edited.rollback("all")
    assert torch.equal(nethook.get_parameter(model, name), before)
    with pytest.raises(NoCounterpartError, match="rollback"):
        apply_rome_to_model(edited, tok, [request], hparams, copy=True)


def test_ike_takes_the_facts_it_is_given(tmp_path: Path) -> None:
    facts = easyedit.ZsreDataset(write(tmp_path / "z.json", zsre(4)))
    hparams = HyperParams(alg_name="IKE", model_name="kedit/world-gpt2", k=2)
    easyedit.encode_ike_facts(None, facts, hparams)
    editor = BaseEditor.from_hparams(hparams)
    metrics, edited, weights = editor.edit(prompts="Otto is a", target_new="plumber", verbose=False)
    assert len(metrics) == 1 and weights == {}
    assert edited.edits[0].diagnostics["demonstrations"] == 3  # two facts and the edit itself
    again = BaseEditor(HyperParams(alg_name="IKE", k=2), edited)
    _, edited, _ = again.edit(prompts="Emil is a", target_new="cook", train_ds=facts, verbose=False)
    assert edited.edits[-1].diagnostics["demonstrations"] == 3
    without = HyperParams(alg_name="ICE", use_icl_examples=False)
    _, edited, _ = BaseEditor(without, edited).edit(prompts="Ida is a", target_new="judge", verbose=False)
    assert edited.edits[-1].diagnostics["demonstrations"] == 0
    edited.rollback("all")


def test_an_editor_is_trained_and_used(tmp_path: Path) -> None:
    facts = easyedit.ZsreDataset(write(tmp_path / "z.json", zsre(6)))
    hparams = easyedit.MENDTrainingHparams(**{**MEND, "results_dir": str(tmp_path)})
    trainer = EditTrainer(config=hparams, train_set=facts, val_set=facts)
    scores = trainer.run()
    assert trainer.trainer.state.global_step == 3
    assert scores["eval_locality"] == pytest.approx(trainer.trainer.evaluate()["eval_locality"], abs=1e-6)
    assert (tmp_path / "models" / "mend" / "editor.safetensors").is_file()
    trainer.model.edit(facts.requests()[0])
    assert len(trainer.model.edits) == 1 and trainer.model.edits[0].method == "mend"
    nothing = EditTrainer(config=hparams, train_set=facts, val_set=None)
    assert nothing.run() == {}


# ---------------------------------------------------------------------- saying what happened

FT = {"alg_name": "FT", "objective_optimization": "target_new", "layers": [4], "num_steps": 2, "lr": "5e-3"}
PEOPLE = ["Otto", "Emil", "Ida"]


def ask(editor: BaseEditor, call: str = "edit", **arguments: Any) -> Any:
    prompts = [f"{person} is a" for person in PEOPLE]
    return getattr(editor, call)(prompts=prompts, target_new=["cook"] * 3, verbose=False, **arguments)


def test_batches_say_what_stays(world_gpt2: EditableModel, caplog: pytest.LogCaptureFixture) -> None:
    editor = BaseEditor(HyperParams(**FT), world_gpt2)
    _, edited, _ = ask(editor, "batch_edit")
    assert len(edited.edits) == 3 and "undone" not in caplog.text, "without a size all are made together"
    edited.rollback("all")
    editor.hparams.batch_size = 2  # scripts set it late
    _, edited, _ = ask(editor, "batch_edit")
    assert len(edited.edits) == 1 and "1 of the 3 edits" in caplog.text and "undone" in caplog.text
    edited.rollback("all")
    caplog.clear()
    _, edited, _ = ask(editor, "batch_edit", sequential_edit=True)
    assert len(edited.edits) == 3 and "undone" not in caplog.text
    edited.rollback("all")
    _, edited, _ = ask(editor)
    assert len(edited.edits) == 1 and "1 of the 3 edits" in caplog.text and "sequential_edit=True" in caplog.text
    edited.rollback("all")
    caplog.clear()
    _, edited, _ = ask(editor, sequential_edit=True, keep_original_weight=True, depth=3, pre_file=None)
    assert len(edited.edits) == 3 and "'depth' has no meaning" in caplog.text and "keep_original" not in caplog.text
    edited.rollback("all")
    nothing, edited, _ = ask(editor, "normal_edit")
    assert nothing is None and len(edited.edits) == 3


def test_hyperparameters_that_scripts_look_into(world_gpt2: EditableModel, caplog: pytest.LogCaptureFixture) -> None:
    simie = easyedit.SimIEHyperParams(alg_name="SimIE", base_method="FT", model_name="gpt2", lamHyper=10.0)
    assert simie.base_hparams.model_name == "gpt2" and simie.base_hparams.alg_name == "FT"
    assert BaseEditor(simie, world_gpt2).config.base["edit_type"] == "ft-l"  # type: ignore[attr-defined]
    assert not hasattr(simie, "nothing")
    wise = HyperParams(alg_name="WISE", n_iter=1, layers=[4], context_templates=["{}"])
    editor = BaseEditor(wise, world_gpt2)
    texts = ["who plays the flute Berta"]
    editor.edit(prompts="Otto is a", target_new="cook", loc_prompts=texts, verbose=False)
    assert editor.config.irrelevant_texts == texts and "loc_prompts" not in caplog.text  # type: ignore[attr-defined]
    world_gpt2.rollback("all")


@pytest.mark.parametrize("missing", [None, [None], [""]])
def test_a_probe_without_an_answer_is_told(
    missing: Any, world_gpt2: EditableModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_kedit.logging._said", set())
    editor = BaseEditor(HyperParams(**FT), world_gpt2)
    probes = {"near": {"prompt": ["Berta is a"], "ground_truth": missing}}
    metrics, _, _ = editor.edit(prompts=["Otto is a"], target_new=["cook"], locality_inputs=probes, verbose=False)
    assert "locality 'near'" in caplog.text and "near_acc" not in metrics[0]["post"].get("locality", {})


def test_request_dicts(world_gpt2: EditableModel) -> None:
    request = {
        "prompt": "Otto is a",
        "target_new": "cook",
        "ground_truth": "baker",
        "rephrase_prompt": "Otto works as",
    }
    request["locality"] = {"near": {"prompt": ["Berta is a"], "ground_truth": ["judge"]}}
    editor = BaseEditor(HyperParams(**FT), world_gpt2)
    metrics, edited, _ = editor.edit_requests([request], verbose=False)
    assert metrics[0]["requested_rewrite"]["rephrase_prompt"] == "Otto works as" and len(edited.edits) == 1
    assert "near_acc" in metrics[0]["post"]["locality"]
    for wrong in ("text", {"prompt": "a", "target_new": "b", "locality": ["c"]}, {"target_new": "b"}):
        with pytest.raises(RequestError):
            editor.edit_requests([wrong], verbose=False)  # type: ignore[list-item]
    assert editor.tok is world_gpt2.tokenizer
    with pytest.raises(NoCounterpartError, match="from_backend"):
        editor.deep_edit([])
    assert not hasattr(editor, "something_else")
