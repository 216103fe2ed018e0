"""Every name that a script takes from EasyEdit: what it is here, or which way of ours leads to the same."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

from torch import nn

from ...errors import NoCounterpartError, nearest
from ...logging import get_logger
from .editor import BaseEditor, BatchEditor, apply_to_model, encode_ike_facts
from .facts import (
    AKEWDataset,
    AKEWUnifiedDataset,
    CaptionDataset,
    CKnowEditDataset,
    ComprehendEditDataset,
    CounterFactDataset,
    KnowEditDataset,
    LongFormEditDataset,
    MQuAKEDataset,
    PersonalityDataset,
    SafetyDataset,
    SanitizationTrainDataset,
    VQADataset,
    WikiBigEditDataset,
    WikiRecentDataset,
    ZsreDataset,
)
from .hparams import HyperParams
from .measures import (
    compute_edit_quality,
    n_gram_entropy,
    summary_metrics,
    test_generation_quality,
    test_prediction_acc,
)
from .multimodal import MultimodalEditor
from .scenario_editors import ConceptEditor, PerEditor, SafetyEditor
from .training import EditTrainer, PEREditTrainer
from .unstructured import apply_ft_uns_to_model, apply_lora_uns_to_model, apply_unke_to_model, eval_akew_unstructured

# Method → name of its hyperparameters, of those to edit with and of those to train an editor with.
HPARAMS = {
    "alphaedit": "AlphaEditHyperParams",
    "core": "COREHyperParams",
    "deepedit_api": "DeepEditApiHyperParams",
    "defer": "DeferHyperParams",
    "dpo": "DPOHyperParams",
    "eamet": "EAMETHyperParams",
    "emmet": "EMMETHyperParams",
    "ft": "FTHyperParams",
    "grace": "GraceHyperParams",
    "ike": "IKEHyperParams",
    "dinm": "DINMHyperParams",
    "ke": "KEHyperParams",
    "kn": "KNHyperParams",
    "lora": "LoRAHyperParams",
    "malmen": "MALMENHyperParams",
    "melo": "MELOHyperParams",
    "memit": "MEMITHyperParams",
    "mend": "MENDHyperParams",
    "namet": "NAMETHyperParams",
    "pmet": "PMETHyperParams",
    "qlora": "QLoRAHyperParams",
    "r_rome": "R_ROMEHyperParams",
    "rome": "ROMEHyperParams",
    "serac": "SERACHparams",
    "simie": "SimIEHyperParams",
    "SPHERE": "SPHEREHyperParams",
    "tpatcher": "TPatcherHyperParams",
    "ultraedit": "UltraEditHyperParams",
    "unke": "unkeHyperParams",
    "unke_ARE": "unkeAREHyperParams",
    "ft_uns": "FT_uns_HyperParams",
    "lora_uns": "LoRA_uns_HyperParams",
    "wise": "WISEHyperParams",
}
MULTIMODAL = (
    "IKEMultimodalHyperParams", "LoRAMultimodalHyperParams", "MENDMultimodalHparams", "SERACMultimodalHparams",
    "WISEMultimodalHyperParams",
)  # fmt: skip
TRAINING = ("KETrainingHparams", "MALMENTrainingHparams", "MENDTrainingHparams", "SERACTrainingHparams")


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module of this name."""
    return model.get_submodule(name)


def get_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of this name."""
    return model.get_parameter(name)


def set_requires_grad(requires_grad: bool, *models: nn.Module | nn.Parameter) -> None:
    """Whether gradients are collected."""
    for model in models:
        model.requires_grad_(requires_grad)


HERE: dict[str, Any] = {
    thing.__name__: thing
    for thing in (
        BaseEditor, BatchEditor, EditTrainer, HyperParams, ConceptEditor, PerEditor, PEREditTrainer,
        SafetyEditor, MultimodalEditor,
        AKEWDataset, AKEWUnifiedDataset, CaptionDataset, CKnowEditDataset, CounterFactDataset, KnowEditDataset,
        ComprehendEditDataset,
        LongFormEditDataset, MQuAKEDataset, PersonalityDataset, SafetyDataset, SanitizationTrainDataset, VQADataset,
        WikiBigEditDataset, WikiRecentDataset, ZsreDataset,
        compute_edit_quality, encode_ike_facts, eval_akew_unstructured, n_gram_entropy, summary_metrics,
        test_generation_quality, test_prediction_acc,
        get_module, get_parameter, set_requires_grad,
    )
}  # fmt: skip
HERE |= {name: type(name, (HyperParams,), {"METHOD": method}) for method, name in HPARAMS.items()}
HERE |= dict.fromkeys([*TRAINING, *MULTIMODAL], HyperParams)
HERE["encode_ike_facts_multimodal"] = encode_ike_facts
HERE |= {f"apply_{method}_to_model": apply_to_model for method in HPARAMS if method not in ("ike", "mend", "serac")}
HERE |= {"apply_unke_to_model": apply_unke_to_model, "apply_unke_ARE_to_model": apply_unke_to_model}
HERE["apply_deepedit_api_to_model"] = lambda datasets, hparams, **_: BaseEditor(hparams).deep_edit(datasets)
HERE |= {"apply_ft_uns_to_model": apply_ft_uns_to_model, "apply_lora_uns_to_model": apply_lora_uns_to_model}
HERE |= {"LOG": get_logger("hf_kedit.compat.easyedit"), "DS_DICT": {"cf": CounterFactDataset, "zsre": ZsreDataset}}
HERE["ALG_DICT"] = dict.fromkeys(
    ("ROME", "MEMIT", "FT", "KN", "LoRA", "PMET", "GRACE", "WISE", "AlphaEdit"), apply_to_model
)


# The way that we have instead → names that EasyEdit has.
_WAYS: dict[str, str] = {
    "hf_kedit.decode_with(model, 'dola' or 'deco'), around model.generate": """
        DeCoHyperParams DoLaHyperParams DecoHyperParams DolaHyperParams""",
    "a provider's own fine-tuning gets its file from model.export_finetune (docs/scenarios/black_box.md)": """
        FTApiHyperParams apply_ft_api_to_model""",
    "MultimodalEditor edits models that see; `kedit train` trains editors (docs/training.md)": """
        MultimodalTrainer MENDMultimodalTrainingHparams SERACMultimodalTrainingHparams ADSEditDataset
        MultimodalEvaluator compute_multimodal_edit_results MendMultimodalRewriteExecutor
        SeracMultimodalRewriteExecutor""",
    "`kedit train` with the method instructedit (docs/methods/instructedit.md)": "MultiTaskDataset MultiTaskTrainer",
    "BaseEditor with IKEHyperParams; hf_kedit.methods.ike.build_prompt makes the text alone": "apply_ike_to_model",
    "hf_kedit.training trains editors, and BaseEditor edits with them (MENDHyperParams, SERACHparams …)": """
        MendRewriteExecutor SeracRewriteExecutor MalmenRewriteExecutor KeRewriteExecutor MEND SERAC SERAC_MULTI KE
        MALMEN ENN FT BaseTrainer ALG_TRAIN_DICT get_model get_tokenizer dict_to""",
    "hf_kedit.evaluate_edits measures edits, hf_kedit.evaluation.functional has every metric by itself": """
        compute_icl_edit_quality compute_rewrite_or_rephrase_quality compute_locality_quality
        compute_portability_quality compute_sent_metric compute_safety_edit_quality compute_concept_edit_quality
        compute_per_metric compute_per_ike_metric test_batch_prediction_acc
        test_seq2seq_batch_prediction_acc test_concept_gen test_safety_gen test_instance_change PPL OOD_PPL F1 es
        es_per_icl per_generation kl_loc_loss perplexity""",
    "second moments: `kedit stats`, or stats_dataset= with the folder of yours (docs/migrate.md)": """
        layer_stats get_cov SecondMoment STATS_DIR""",
    "hf_kedit.locate traces and attributes": "Trace TraceDict KnowledgeNeurons LogitLens causal_trace",
    "model.generate, as with every transformers model": "generate_fast generate_interactive",
    "EditableModel.from_pretrained loads every decoder": "load_qwen35_language_model is_qwen35_vl_text_model",
    "load_edit_dataset gives the rows": "AttributeSnippets KnownsDataset get_tfidf_vectorizer adjust_cf",
    "a step inside a method; EditableModel.edit makes the edit, hf_kedit.methods has the methods": """
        compute_z compute_ks compute_u compute_v get_context_templates execute_rome execute_memit execute_ft
        execute_pmet execute_lora upd_matrix_match_shape get_module_input_output_at_words LORA GRACE WISE
        WISEMultimodal MELO DEFER""",
    "steering has no counterpart here": "SteerEditor BaseSteerer BaseVectorApplier BaseVectorGenerator",
}
ABSENT = {name: way for way, names in _WAYS.items() for name in names.split()}

_MODELS = [*HPARAMS, *"deco dola ft_api".split()]
_FILES = {"alphaedit": "AlphaEdit"}  # where the files of a folder are spelt otherwise
_INSIDE = {
    "models": "ike.util rome.layer_stats wise.WISE grace.GRACE melo.melo defer.DEFER kn.knowledge_neurons"
    " mend.mend_multimodal_hparams rome.compute_u rome.compute_v memit.compute_z memit.compute_ks alphaedit.compute_z"
    " alphaedit.compute_ks",
    "dataset": "zsre counterfact knowedit wiki_recent vqa coco_caption sanitization personality safety multitask"
    " Cknowedit MQuAKE wikibigedit akew AKEW_both LEME longform ComprehendEdit adsedit knowns",
    "editors": "editor utils batch_editor concept_editor multimodal_editor per_editor safety_editor singleton_editor"
    " steer_editor",
    "evaluate": "evaluate evaluate_utils evaluate_uns concept_evaluate safety_evaluate multimodal_evaluate"
    " personality_evaluate portability_evaluate metric_meta",
    "trainer": "BaseTrainer EditTrainer MultimodalTrainer MultiTaskTrainer PerTrainer algs blip2_models losses models"
    " utils algs.KE algs.MALMEN algs.MEND algs.SERAC algs.ENN algs.editable_model training_hparams"
    " training_hparams.ke_training_hparams training_hparams.malmen_training_hparams"
    " training_hparams.mend_training_hparams training_hparams.serac_training_hparams",
    "util": "alg_dict alg_train_dict device generate globals hparams logit_lens model_loader nethook perplexity"
    " runningstats",
}
MODULES = [
    *_INSIDE,
    *(f"models.{method}" for method in _MODELS),
    *(f"models.{method}.{_FILES.get(method, method)}_{part}" for method in _MODELS for part in ("hparams", "main")),
    *(f"{room}.{path}" for room, paths in _INSIDE.items() for path in paths.split()),
]
"""Module paths of EasyEdit below its top."""


class Absent:
    """Stands for a name that has no counterpart, so that the import line runs; whatever is done with it, it raises."""

    def __init__(self, name: str, way: str):
        self._error = f"EasyEdit's {name} has no counterpart here: {way}"

    def __repr__(self) -> str:
        return f"<{self._error}>"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NoCounterpartError(self._error)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # inspection of whatever it is
            raise AttributeError(name)
        raise NoCounterpartError(self._error)

    def __mro_entries__(self, bases: Any) -> NoReturn:
        raise NoCounterpartError(self._error)

    def __instancecheck__(self, thing: Any) -> NoReturn:
        raise NoCounterpartError(self._error)


def find(name: str) -> Any:
    """What a name of EasyEdit's is here.

    Raises:
        AttributeError: for a private name.
        NoCounterpartError: if EasyEdit has no such name, as far as this module knows.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    if name in HERE:
        return HERE[name]
    if name in ABSENT:
        return Absent(name, ABSENT[name])
    raise NoCounterpartError(
        f"{name!r} is no name of EasyEdit's that is known here.{nearest(name, [*HERE, *ABSENT])}"
        " docs/migrate.md lists what there is."
    )


class Door(ModuleType):
    """One of EasyEdit's modules: every name that is known here can be imported from it."""

    __all__ = sorted(HERE)

    def __init__(self, name: str, doc: str):
        super().__init__(name, doc)
        self.__path__ = []  # so that Python asks the finders for what is imported from below it

    def __getattr__(self, name: str) -> Any:
        return find(name)


class Signpost:
    """The last finder: whoever imports a module that nobody has found, below EasyEdit's names, is shown the way.

    Args:
        package: that has the doors.
    """

    def __init__(self, package: str):
        self._package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """See `importlib.abc.MetaPathFinder`.

        Raises:
            NoCounterpartError: for a module below the package.
        """
        below = name.removeprefix(f"{self._package}.")
        if below != name and not below.rpartition(".")[2].startswith("_"):
            raise NoCounterpartError(
                f"{below!r} is no module of EasyEdit's that is known here.{nearest(below, MODULES)} Every name that"
                f" there is can be imported from {self._package}; docs/migrate.md lists them.",
                name=name,
            )
