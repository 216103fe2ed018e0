"""EasyEdit's `BaseEditor` on top of this library.

Arguments, the layout of the metrics and the three return values are EasyEdit's. The numbers are this library's: its
methods, its protocols (teacher forced), its reading of the hyperparameters. docs/migrate.md lists the differences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import EditConfig
from ...config.easyedit import convert_hparams
from ...data.easyedit import from_easyedit, from_easyedit_requests
from ...editors.editor import EditorConfig
from ...editors.files import EDITOR_WEIGHTS
from ...embedded import PREFIX
from ...errors import ConfigError, NoCounterpartError
from ...evaluation import Fluency, evaluate_edits, generate_answers
from ...evaluation.report.case_result import easyedit_request
from ...logging import get_logger
from ...methods.wise import WISEConfig
from ...model import EditableModel
from ...requests import EditRequest
from ...storage.files import write_text
from ...tokens import context_length
from .behind_api import answers_by_hops, is_behind_api, model_behind_api
from .extras import Extras, Row, protocol_of
from .facts import Facts
from .hparams import HyperParams, values_of
from .measures import test_generation_quality
from .originals import Originals, accept_restored
from .placing import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)
Edited = tuple[list[Row], EditableModel, Originals]
_UNDERSTOOD = (
    "eval_metric",
    "metric_kwargs",
    "pre_file",
    "pre_edit",
    "requests",
    "keep_original_weight",
    "target_neg",
)
"""Further arguments of EasyEdit's that mean something here; the original weights are always kept."""


class BaseEditor:
    """Edits one model with one method and measures every edit.

    Args:
        hparams: a `HyperParams`, or a mapping with the same content. What a script changes in them later counts at the
            next edit.
        model: a loaded `EditableModel` to edit, instead of loading ``model_name``.

    Raises:
        ConfigError: if the hyperparameters are unusable or name no model.
    """

    def __init__(self, hparams: HyperParams | Mapping[str, Any], model: EditableModel | None = None):
        self.hparams = hparams
        self._seen = values_of(hparams)
        if is_behind_api(self._seen):
            self.model = model or model_behind_api(self._seen)
            self.config, self.model_name = self.model.edit_config, self._seen.get("model_name")
            return
        converted = convert_hparams(self._seen)
        for key, reason in converted.ignored.items():
            logger.info("%s: ignored: %s", key, reason)
        self.config = self._config_of(converted.config, self._seen)
        self.model_name = converted.model_name
        if model is not None:
            self.model = model.set_method(self.config)
        elif converted.model_name:
            options = loading_options(self._seen, converted.config.edit_type)
            try:
                self.model = EditableModel.from_pretrained(converted.model_name, self.config, **options)
            except ConfigError:
                if getattr(self.config, "editor", "") is not None:
                    raise
                # Scripts make their editor first and train its networks then: the first edit looks for them again.
                self.model = EditableModel.from_pretrained(converted.model_name, **options)
                self._seen = {}
        else:
            raise ConfigError("the hyperparameters name no model (model_name)")

    @property
    def alg_name(self) -> str:
        """EasyEdit's name of the method."""
        return str(values_of(self.hparams).get("alg_name"))

    @property
    def apply_algo(self) -> Callable[..., tuple[EditableModel, Originals]]:
        """EasyEdit's function of the method; see `apply_to_model`."""
        return apply_to_model

    @classmethod
    def from_hparams(cls, hparams: HyperParams | Mapping[str, Any]) -> BaseEditor:
        """Load the model that the hyperparameters name."""
        return cls(hparams)

    @property
    def tok(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer."""
        return self.model.tokenizer

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: Any = None,
        rephrase_prompts: Any = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        subject: str | Sequence[str | None] | None = None,
        test_generation: bool = False,
        train_ds: Facts | Sequence[Any] | None = None,
        **other: Any,
    ) -> Edited:
        """Make one edit per prompt and measure it.

        With ``sequential_edit`` the edits are made one after the other, all stay, and all are measured at the end.
        Without it each is made on the original model, measured and undone, except the last, which stays.

        Args:
            prompts: one text, or one per edit; likewise the arguments that follow, as in EasyEdit.
            target_new: the new answers.
            ground_truth: the old answers.
            rephrase_prompts: other wordings.
            locality_inputs: axis → ``prompt`` and ``ground_truth`` of what must stay.
            portability_inputs: likewise of what must follow.
            sequential_edit: see above.
            verbose: show progress.
            subject: what the facts are about.
            test_generation: measure fluency too.
            train_ds: facts that IKE takes its demonstrations from.
            other: ``eval_metric`` (``"ppl"``, ``"ood_ppl"``: besides the accuracies), ``metric_kwargs`` (opinions, see
                `extras.opinion_metrics`), ``pre_file`` (where the numbers of the unedited model are written),
                ``requests`` (request dicts instead of all the above), ``target_neg`` (one answer that is to go per
                edit: DPO). Anything else has no meaning here, and a warning says so.

        Returns:
            One dict per request in EasyEdit's layout; the edited model (``rollback("all")`` undoes); and the
            original weights of what the edits changed, by parameter name.

        Raises:
            RequestError: for an unusable request.
            ConfigError: if an ``api_key`` among the hyperparameters is a key.
        """
        if (given := other.get("requests")) is not None:
            requests = from_easyedit_requests(given)
        else:
            neg = other.get("target_neg")
            requests = from_easyedit(
                prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject, neg
            )
        return self._edit(requests, 1, sequential_edit, verbose, test_generation, train_ds, other)

    def batch_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        ground_truth: Any = None,
        rephrase_prompts: Any = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        subject: Sequence[str | None] | None = None,
        test_generation: bool = False,
        train_ds: Facts | Sequence[Any] | None = None,
        **other: Any,
    ) -> Edited:
        """Make the edits in batches of the hyperparameters' ``batch_size``, all together without one; see `edit`.

        With ``sequential_edit`` the batches build on each other and are measured at the end. Without it each batch is
        measured on its own, and the last one stays.
        """
        neg = other.get("target_neg")
        requests = from_easyedit(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject, neg
        )
        size = values_of(self.hparams).get("batch_size") or len(requests)
        if isinstance(size, bool) or not str(size).isdecimal():
            raise ConfigError(f"batch_size must be a whole number above 0, not {size!r}")
        return self._edit(requests, int(size), sequential_edit, verbose, test_generation, train_ds, other)

    def edit_requests(
        self,
        requests: Sequence[Mapping[str, Any]],
        sequential_edit: bool = False,
        verbose: bool = True,
        test_generation: bool = False,
        **other: Any,
    ) -> Edited:
        """`edit` of EasyEdit's request dicts."""
        train_ds = other.pop("train_ds", None)
        given = from_easyedit_requests(requests)
        return self._edit(given, 1, sequential_edit, verbose, test_generation, train_ds, other)

    def edit_dataset(
        self, ds: Facts, keep_original_weight: bool = False, verbose: bool = True, **other: Any
    ) -> Edited:
        """`edit` of all rows of a data set, each on the original model."""
        return self._edit(ds.requests(), 1, False, verbose, False, other.pop("train_ds", None), other)

    def normal_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        subject: Sequence[str | None] | None = None,
        verbose: bool = True,
        **other: Any,
    ) -> tuple[None, EditableModel, Originals]:
        """Make all edits together and measure nothing; see `edit`."""
        self._use_hparams(None, other)
        requests = from_easyedit(prompts, target_new, subject=subject, target_neg=other.get("target_neg"))
        self.model.edit(requests, show_progress=verbose)
        return None, self.model, Originals(self.model)

    def generate_edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: Any = None,
        rephrase_prompts: Any = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        subject: str | Sequence[str | None] | None = None,
        test_generation: bool = False,
        train_ds: Facts | Sequence[Any] | None = None,
        max_new_tokens: int = 512,
        **other: Any,
    ) -> Edited:
        """Make one edit per prompt and let the model write, before and after; see `edit` for the arguments.

        Questions are put through the tokenizer's chat template where there is one. Nothing is scored.

        Args:
            max_new_tokens: length limit of an answer; half of the model's context where that is less.

        Returns:
            As `edit`; ``pre`` and ``post`` hold ``rewrite_ans``, ``rephrase_ans`` (a list where there are several
            wordings), ``portability_ans``, ``locality_ans`` and, with ``test_generation``, ``fluency``.
        """
        neg = other.get("target_neg")
        requests = from_easyedit(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject, neg
        )
        self._use_hparams(train_ds, other)
        before = [self._written(request, max_new_tokens, False) for request in requests]

        def measure(number: int) -> dict[str, Row]:
            after = self._written(requests[number], max_new_tokens, test_generation)
            return {"pre": before[number], "post": after}

        rows = self._each(requests, sequential_edit, verbose, measure)
        _write_before(rows, other)
        return rows, self.model, Originals(self.model)

    def deep_edit(self, datasets: Facts | Sequence[Mapping[str, Any]]) -> list[str]:
        """Ask a model behind an API the questions of several hops of edited cases; see `answers_by_hops`.

        Raises:
            NoCounterpartError: for any other model.
        """
        if not self.model.is_remote:
            raise NoCounterpartError(
                "EasyEdit's BaseEditor.deep_edit asks a model behind an API: take DeepEditApiHyperParams, or"
                " EditableModel.from_backend(…) and its answer_by_hops"
            )
        return answers_by_hops(self.model, datasets)

    # ------------------------------------------------------------------ shared by all of these

    def _edit(
        self,
        requests: Sequence[EditRequest],
        size: int,
        sequential: bool,
        verbose: bool,
        test_generation: bool,
        train_ds: Facts | Sequence[Any] | None,
        other: Mapping[str, Any],
    ) -> Edited:
        """Make the edits in batches of ``size``, measure them, and leave those of the last batch at least."""
        self._use_hparams(train_ds, other)
        together = sequential or len(requests) <= size
        last = requests[(len(requests) - 1) // size * size :]
        if not together:
            _tell_what_stays(len(last), len(requests), size)
        setting: Any = "sequential" if together else "single" if size == 1 else "batch"
        extras = Extras(self.model, requests, other.get("eval_metric"), other.get("metric_kwargs"))
        report = evaluate_edits(
            self.model,
            list(requests),
            setting,
            size,
            [protocol_of(self._seen), *([Fluency(max_total_tokens=self._room(100))] if test_generation else [])],
            progress=verbose,
            keep_edits=together,
            after_step=extras,
        )
        if not together:
            self.model.edit(last, show_progress=verbose)
        rows = report.to_easyedit()
        extras.merge(rows)
        _write_before(rows, other)
        return rows, self.model, Originals(self.model)

    def _each(
        self,
        requests: Sequence[EditRequest],
        sequential: bool | None,
        verbose: bool,
        measure: Callable[[int], Row],
    ) -> list[Row]:
        """Make edits, each on the original model and undone but for the last, or one on the other; what each gave.

        Args:
            requests: to make.
            sequential: all stay, and are measured at the end; ``None``: not, and whoever calls has no choice.
            verbose: show progress.
            measure: number of a request → its numbers, on the model that shows the edit.
        """
        model, carried = self.model, len(self.model.edits)
        rows: list[Row] = []
        if not sequential and len(requests) > 1:
            _tell_what_stays(1, len(requests), 1, may_be_sequential=sequential is not None)
        try:
            for group in [requests] if sequential else [[request] for request in requests]:
                if len(model.edits) > carried:
                    model.rollback(len(model.edits) - carried)
                result = model.edit(list(group), batch_size=1, show_progress=verbose)
                for request in group:
                    about = {"case_id": len(rows), "requested_rewrite": easyedit_request(request)}
                    rows.append({**about, **measure(len(rows)), "time": result.seconds / len(group)})
        except BaseException:
            if len(model.edits) > carried:
                model.rollback(len(model.edits) - carried)
            raise
        return rows

    def _written(self, request: EditRequest, max_new_tokens: int, fluent: bool) -> Row:
        """What the model writes when it is asked about a request."""
        tokenizer: Any = self.model.tokenizer
        near = [probe.prompt for probes in request.locality.values() for probe in probes]
        far = [probe.prompt for probes in request.portability.values() for probe in probes]
        prompts = [request.filled_prompt, *request.rephrase_prompts, *far, *near]
        model: Any = self.model
        answers = generate_answers(
            model,
            tokenizer,
            prompts,
            self._room(max_new_tokens),
            prompt_format="chat" if tokenizer.chat_template else "raw",
            cut_at_newline=False,
        )
        texts = iter([answer.text for answer in answers])
        row: Row = {"rewrite_ans": next(texts)}
        if wordings := [next(texts) for _ in request.rephrase_prompts]:
            row["rephrase_ans"] = wordings[0] if len(wordings) == 1 else wordings
        row["portability_ans"] = [next(texts) for _ in far]
        if near:
            row["locality_ans"] = list(texts)
        if fluent:
            row["fluency"] = test_generation_quality(model, tokenizer, [request.filled_prompt])
        return row

    def _use_hparams(self, train_ds: Facts | Sequence[Any] | None, other: Mapping[str, Any]) -> None:
        """Take over what a script has changed, and say which arguments count for nothing."""
        accept_restored(self.model)
        values = values_of(self.hparams)
        for name, value in other.items():
            if name == "loc_prompts" and value and isinstance(self.config, WISEConfig):
                values.setdefault("irrelevant_texts", list(value))
            elif name == "pre_edit" and value is not None:
                logger.info("pre_edit: the unedited model is measured anew, as locality needs it")
            elif name not in _UNDERSTOOD and value is not None:
                logger.warning("the argument %r has no meaning here and is ignored", name)
        if train_ds is not None:
            values.setdefault("demonstrations", demonstrations_of(train_ds))
        config = self._config_of(convert_hparams(values).config, values)
        if values != self._seen or config != self.config:
            self._seen, self.config = values, config
            self.model.set_method(config)

    def _config_of(self, config: EditConfig, values: Mapping[str, Any]) -> EditConfig:
        """The config with the trained editor that a file's ``archive`` names, or that `EditTrainer` has left in its
        ``results_dir``."""
        if isinstance(config, EditorConfig) and config.editor is None:
            trained = Path(str(values.get("results_dir") or "results")) / "models" / config.edit_type
            for folder in (values.get("archive"), trained):
                if folder and (str(folder).startswith(PREFIX) or os.path.isfile(Path(str(folder)) / EDITOR_WEIGHTS)):
                    return replace(config, editor=str(folder))
        return config

    def _room(self, wanted: int) -> int:
        """So many new tokens, or half of the model's context if that is less."""
        limit = context_length(self.model.config)
        return wanted if limit is None else min(wanted, limit // 2)


class BatchEditor(BaseEditor):
    """A `BaseEditor` whose `edit` is `batch_edit`."""

    edit = BaseEditor.batch_edit


def _tell_what_stays(kept: int, count: int, size: int, *, may_be_sequential: bool = True) -> None:
    """Say that not all of the edits are in the returned model."""
    remedy = "; sequential_edit=True keeps all" if may_be_sequential else ""
    if size > 1:
        remedy += ", a batch_size of at least that number makes them together"
    logger.warning(
        "the returned model has %d of the %d edits: each %s was made on the original model, measured and undone but"
        " for the last%s",
        kept,
        count,
        "one" if size == 1 else "batch",
        remedy,
    )


def _write_before(rows: Sequence[Row], other: Mapping[str, Any]) -> None:
    """Write the numbers of the unedited model where ``pre_file`` says."""
    if other.get("pre_file") and not other.get("pre_edit"):
        before = [{"pre": row["pre"]} for row in rows]
        text = json.dumps(before, indent=4, ensure_ascii=False)
        write_text(Path(other["pre_file"]), text, errors="backslashreplace")


def demonstrations_of(facts: Facts | Sequence[Any]) -> list[dict[str, Any]]:
    """Facts as IKE's config takes them."""
    requests = facts.requests() if isinstance(facts, Facts) else from_easyedit_requests(facts)
    return [request.to_dict() for request in requests]


def encode_ike_facts(sentence_model: Any, ds: Facts | Sequence[Any], hparams: HyperParams) -> None:
    """Let IKE take its demonstrations from ``ds``.

    Nothing is encoded or written: the retriever that ``hparams`` names (``sentence_model_name``) reads the facts when
    the first edit is made, and keeps what it has read.
    """
    hparams.demonstrations = demonstrations_of(ds)


def apply_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: HyperParams | Mapping[str, Any],
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **other: Any,
) -> tuple[EditableModel, Originals]:
    """EasyEdit's ``apply_<method>_to_model`` of every method: make all requests in one batch.

    Args:
        model: a transformers model or an `EditableModel`; edited in place.
        tok: its tokenizer.
        requests: EasyEdit's request dicts.
        hparams: of the method.
        copy: edit a copy of the model.
        return_orig_weights: no meaning; they always come along.
        keep_original_weight: likewise.
        other: no meaning.

    Returns:
        The edited model (``rollback("all")`` undoes) and the original weights by parameter name, which may be copied
        back into the parameters.
    """
    if not isinstance(model, EditableModel):
        model = EditableModel(deepcopy(model) if copy else model, convert_hparams(values_of(hparams)).config, tok)
    elif copy:
        raise NoCounterpartError("copy=True: an EditableModel is not copied; rollback() takes its edits back")
    editor = BaseEditor(hparams, model)
    accept_restored(model)
    editor.model.edit(from_easyedit_requests(requests))
    return editor.model, Originals(editor.model)
