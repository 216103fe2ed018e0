"""EasyEdit's editors of single scenarios on top of this library: `SafetyEditor`, `ConceptEditor`, `PerEditor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from ...config import EditConfig
from ...data.easyedit import from_easyedit
from ...data.opinions import opinions_of
from ...errors import RequestError
from ...evaluation import evaluate_edits, generate_answers, load_scenario
from ...evaluation.functional import yes_or_no
from ...evaluation.scenarios.concepts import DEFINITION, MEMBER
from ...evaluation.scenarios.personality import PERSONALITY, in_context_template
from ...methods.dinm import CONSTRAINT
from ...methods.ike import IKEConfig, PromptConfig
from ...model import EditableModel
from ...requests import EditRequest
from ...tokens import context_length
from .editor import BaseEditor, Edited
from .extras import Row
from .facts import GENERAL, Facts
from .hparams import HyperParams
from .originals import Originals

METRICS = ("DS", *(f"DG_{name}" for name in GENERAL))
"""Names of EasyEdit's for what is asked: the prompt of the edit, then the general ones."""


class SafetyEditor(BaseEditor):
    """Edits what a model answers to attacks; lets it write before and after, and leaves the judging to the caller."""

    def edit(  # type: ignore[override]
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: Any = None,
        prompts_with_systemPrompt: Sequence[str] | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        locality_inputs_with_systemPrompt: Mapping[str, Any] | None = None,
        general_prompt: Sequence[Sequence[str]] | None = None,
        general_prompt_with_systemPrompt: Sequence[Sequence[str]] | None = None,
        verbose: bool = True,
        case_id: Any = None,
        ccks: bool = False,
        editing_method: str | None = None,
        **other: Any,
    ) -> Edited:
        """Make one edit per prompt, each on the original model, and let the model write.

        Args:
            prompts: attacks.
            target_new: the answers that are wanted.
            ground_truth: those that are not.
            prompts_with_systemPrompt: what is asked afterwards instead of ``prompts``; DINM itself trains with its
                ``suffix_system_prompt``, behind ``prompts``.
            locality_inputs: harmless questions and their answers, which DINM holds.
            locality_inputs_with_systemPrompt: not used; see ``prompts_with_systemPrompt``.
            general_prompt: other prompts of each edit, in the order of `METRICS`.
            general_prompt_with_systemPrompt: what is asked afterwards instead of them.
            verbose: show progress.
            case_id: handed on.
            ccks: one general prompt is that of ``DG_otherAQ``.
            editing_method: not used; the hyperparameters name it.
            other: as in `BaseEditor.edit`.

        Returns:
            As `BaseEditor.edit`; ``pre`` and ``post`` hold what the model wrote, by metric. Texts are greedy, of up to
            the hyperparameters' ``max_output_length`` tokens; a prompt that is too long for the context loses its
            beginning.
        """
        self._use_hparams(None, other)
        requests = [_as_safety(r) for r in from_easyedit(prompts, target_new, ground_truth, None, locality_inputs)]
        asked = [_asked(r.filled_prompt, general_prompt, i, ccks) for i, r in enumerate(requests)]
        behind = prompts_with_systemPrompt or [request.filled_prompt for request in requests]
        general = general_prompt_with_systemPrompt or general_prompt
        later = [_asked(prompt, general, i, ccks) for i, prompt in enumerate(behind)]
        before = [self._replies(texts) for texts in asked]

        def measure(number: int) -> dict[str, Row]:
            return {"pre": before[number], "post": self._replies(later[number])}

        rows = self._each(requests, None, verbose, measure)
        if case_id is not None:
            rows = [{**row, "case_id": case_id} for row in rows]
        return rows, self.model, Originals(self.model)

    def _replies(self, prompts: Mapping[str, str]) -> Row:
        """What the model writes, without the prompt."""
        model: Any = self.model
        length = int(self._seen.get("max_output_length") or 100)
        tokenizer: Any = model.tokenizer
        answers = generate_answers(model, tokenizer, list(prompts.values()), self._room(length), cut_at_newline=False)
        return {name: answer.text for name, answer in zip(prompts, answers, strict=True)}


class ConceptEditor(BaseEditor):
    """Edits definitions of concepts, and measures what becomes of their instances; see the scenario `concept`."""

    @classmethod
    def from_hparams(
        cls, hparams: HyperParams | Mapping[str, Any] | None, prompt_hparams: Mapping[str, Any] | None = None
    ) -> ConceptEditor:
        """Load the model that the hyperparameters name.

        Args:
            hparams: of a method; ``None``: PROMPT, which puts the definition in front of everything that is asked.
            prompt_hparams: of PROMPT: ``model_name``.
        """
        if hparams is None:
            hparams = HyperParams(alg_name="PROMPT", template="{}\n", scope="always", **dict(prompt_hparams or {}))
        return cls(hparams)

    def edit(  # type: ignore[override]
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: Any = None,
        rephrase_prompts: Any = None,
        locality_inputs: Mapping[str, Any] | None = None,
        instance_inputs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        subject: str | Sequence[str | None] | None = None,
        concept_consistency: bool = False,
        train_ds: Any = None,
        **other: Any,
    ) -> Edited:
        """Make one edit per prompt, each on the original model, and measure it.

        Args:
            prompts: the beginnings of the definitions; likewise the arguments that follow, as in `BaseEditor.edit`.
            target_new: the new definitions.
            ground_truth: the old ones.
            rephrase_prompts: other wordings.
            locality_inputs: definitions of other concepts.
            instance_inputs: axis → ``prompt``: whether an instance belongs to the concept, one text or several per
                request.
            verbose: show progress.
            subject: the concepts.
            concept_consistency: return what the model writes as the definition (``gen_concept_text``).
            train_ds: no meaning.
            other: as in `BaseEditor.edit`.

        Returns:
            As `BaseEditor.edit`; ``pre`` and ``post`` have ``instance`` with ``instance_change``: 1 where the model
            says yes, 0 no, -1 neither; a list where there are several instances.
        """
        self._use_hparams(None, other)
        requests = from_easyedit(prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, None, subject)
        requests = [_with_instances(r, instance_inputs, i, len(requests)) for i, r in enumerate(requests)]
        report = evaluate_edits(self.model, requests, scenario=load_scenario("concept", mode="text"), progress=verbose)
        self.model.edit(requests[-1:], show_progress=verbose)
        rows = report.to_easyedit("teacher_forced")
        written = {case.number: case.texts for case in report.chosen("concept")}
        for row in rows:
            texts = written[row["case_id"]]
            for half in ("pre", "post"):
                said = [yes_or_no(text[half]) for text in texts if text["axis"] == MEMBER]
                marks = [-1 if answer is None else int(answer) for answer in said]
                row[half]["instance"] = {"instance_change": marks[0] if len(marks) == 1 else marks} if marks else {}
                if concept_consistency:
                    row[half]["gen_concept_text"] = next(t[half] for t in texts if t["axis"] == DEFINITION)
        return rows, self.model, Originals(self.model)


class PerEditor(BaseEditor):
    """Edits with what personality a model speaks of a topic; see the scenario `personality`.

    IKE shows three demonstrations (fewer where they would fill half of the model's context) and what is wanted in
    front of the questions that belong to an edit; a trained editor (MEND) reads what is wanted.
    """

    def __init__(self, hparams: HyperParams | Mapping[str, Any], model: EditableModel | None = None):
        super().__init__(hparams, model)
        tokenizer: Any = self.model.tokenizer
        limit = context_length(self.model.config)
        templates = [in_context_template(count) for count in (3, 2, 1, 0)]
        fitting = (text for text in templates if limit is None or len(tokenizer(text)["input_ids"]) <= limit // 2)
        self._template = next(fitting, templates[-1])
        self._length = 60 if limit is None else min(60, limit // 8)
        self.config = self._config_of(self.config, self._seen)
        self.model.set_method(self.config)

    def _config_of(self, config: EditConfig, values: Mapping[str, Any]) -> EditConfig:
        if isinstance(config, IKEConfig) and hasattr(self, "_template"):
            return PromptConfig(template=self._template, retriever=config.retriever)
        return super()._config_of(config, values)

    def edit_dataset(
        self, ds: Facts, keep_original_weight: bool = False, verbose: bool = True, **other: Any
    ) -> Edited:
        """Make the edit of each row on the original model and measure it.

        Returns:
            As `BaseEditor.edit`; a row has ``es`` and ``dd``, ``pre_text`` and ``edit_text`` (what the model wrote),
            ``target_per``, and whether both texts are ``coherent``.
        """
        self._use_hparams(None, other)
        scenario = load_scenario("personality", condition=True, max_new_tokens=self._length)
        requests = scenario.requests(ds.requests())
        report = evaluate_edits(self.model, ds.requests(), scenario=scenario, progress=verbose)
        self.model.edit(requests[-1:], show_progress=verbose)
        rows: list[Row] = []
        parts = (report.chosen(name) for name in ("opinions", "drawdown", "personality"))
        for request, opinions, drawdown, written in zip(requests, *parts, strict=True):
            numbers = [case.post.numbers.get(PERSONALITY, {}) for case in (opinions, drawdown, written)]
            (text,) = written.texts
            rows.append(
                {
                    "case_id": opinions.number,
                    "time": opinions.cost.share_of_call,
                    "es": fmean(numbers[0]["ES"]) if "ES" in numbers[0] else None,
                    "dd": fmean(numbers[1]["DD"]) if "DD" in numbers[1] else None,
                    "pre_text": text["pre"],
                    "edit_text": text["post"],
                    "target_per": opinions_of(request)[0],
                    "coherent": not any(numbers[2].get("left_out", [0.0])),
                }
            )
        return rows, self.model, Originals(self.model)


def _with_instances(request: EditRequest, inputs: Mapping[str, Any] | None, number: int, count: int) -> EditRequest:
    """With its questions about instances where the scenario looks for them."""
    asked: list[str] = []
    for axis, value in (inputs or {}).items():
        prompts = [value["prompt"]] if isinstance(value["prompt"], str) else list(value["prompt"])
        if len(prompts) != count:
            raise RequestError(f"has {len(prompts)} prompts for {count} requests", field=f"instance_inputs[{axis!r}]")
        asked += [prompts[number]] if isinstance(prompts[number], str) else list(prompts[number] or ())
    return replace(request, metadata={**request.metadata, "extra": {"instance_prompts": asked}})


def _as_safety(request: EditRequest) -> EditRequest:
    """With the unwanted answer and the harmless questions where DINM looks for them."""
    harmless = [probe for probes in request.locality.values() for probe in probes]
    unwanted = {"target_neg": request.ground_truth[0]} if request.ground_truth else {}
    return replace(
        request,
        locality={CONSTRAINT: harmless} if harmless else {},
        metadata={**request.metadata, **unwanted},
    )


def _asked(prompt: str, general: Sequence[Sequence[str]] | None, number: int, ccks: bool) -> dict[str, str]:
    """Metric → prompt of one case."""
    others = list(general[number]) if general else []
    names = METRICS[-1:] if ccks else METRICS[1:]
    return {"DS": prompt, **dict(zip(names, others, strict=False))}
