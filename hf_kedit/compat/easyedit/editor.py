"""EasyEdit's `BaseEditor` on top of this library.

Arguments, the layout of the metrics and the three return values are EasyEdit's. The numbers are this library's: its
methods, its protocols (teacher forced), its reading of the hyperparameters. docs/migrate.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from ...config.easyedit import convert_hparams
from ...data.easyedit import from_easyedit, from_easyedit_requests
from ...errors import ConfigError, NoCounterpartError
from ...evaluation import evaluate_edits
from ...logging import get_logger
from ...methods.wise import WISEConfig
from ...model import EditableModel
from ...requests import EditRequest
from .facts import Facts
from .hparams import HyperParams, values_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)
Edited = tuple[list[dict[str, Any]], EditableModel, dict[str, torch.Tensor]]


def _quantisation(values: Mapping[str, Any]) -> Any:
    """How their QLoRA loads its model: in 4 bits unless the file says 8."""
    from transformers import BitsAndBytesConfig

    if int(values.get("quantization_bit") or 4) == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(values.get("quant_type") or "nf4"),
        bnb_4bit_use_double_quant=bool(values.get("double_quant", True)),
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )


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
        converted = convert_hparams(self._seen)
        for key, reason in converted.ignored.items():
            logger.info("%s: ignored: %s", key, reason)
        self.config = converted.config
        self.model_name = converted.model_name
        if model is not None:
            self.model = model.set_method(converted.config)
        elif converted.model_name:
            options: dict[str, Any] = {"dtype": torch.float16 if self._seen.get("fp16") else torch.float32}
            if converted.config.edit_type == "qlora":
                options["quantization_config"] = _quantisation(self._seen)
            self.model = EditableModel.from_pretrained(converted.model_name, converted.config, **options)
        else:
            raise ConfigError("the hyperparameters name no model (model_name)")

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
            other: has no meaning here, and a warning says so.

        Returns:
            One dict per request in EasyEdit's layout; the edited model (``rollback("all")`` undoes); and the
            original weights of what the edits changed, by parameter name.

        Raises:
            RequestError: for an unusable request.
        """
        requests = from_easyedit(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
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
        requests = from_easyedit(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        size = int(values_of(self.hparams).get("batch_size") or len(requests))
        return self._edit(requests, size, sequential_edit, verbose, test_generation, train_ds, other)

    def edit_requests(
        self,
        requests: Sequence[Mapping[str, Any]],
        sequential_edit: bool = False,
        verbose: bool = True,
        test_generation: bool = False,
        **other: Any,
    ) -> Edited:
        """`edit` of EasyEdit's request dicts."""
        return self._edit(from_easyedit_requests(requests), 1, sequential_edit, verbose, test_generation, None, other)

    def normal_edit(
        self,
        prompts: Sequence[str],
        target_new: Sequence[str],
        subject: Sequence[str | None] | None = None,
        verbose: bool = True,
        **other: Any,
    ) -> tuple[None, EditableModel, dict[str, torch.Tensor]]:
        """Make all edits together and measure nothing; see `edit`."""
        self._use_hparams(None, other)
        self.model.edit(from_easyedit(prompts, target_new, subject=subject), show_progress=verbose)
        return None, self.model, self._originals()

    def __getattr__(self, name: str) -> Any:
        """What EasyEdit's editor has and this one has not."""
        if name in ("generate_edit", "edit_dataset", "deep_edit"):
            raise NoCounterpartError(
                f"EasyEdit's BaseEditor.{name} has no counterpart here: use edit() or batch_edit()"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
            logger.warning(
                "the returned model has %d of the %d edits: each %s was made on the original model, measured and"
                " undone but for the last; sequential_edit=True keeps all%s",
                len(last),
                len(requests),
                "one" if size == 1 else "batch",
                "" if size == 1 else ", a batch_size of at least that number makes them together",
            )
        protocols = ["teacher_forced", "fluency"] if test_generation else "teacher_forced"
        setting: Any = "sequential" if together else "single" if size == 1 else "batch"
        report = evaluate_edits(
            self.model,
            list(requests),
            setting,
            size,
            protocols,
            progress=verbose,
            keep_edits=together,
        )
        if not together:
            self.model.edit(last, show_progress=verbose)
        return report.to_easyedit(), self.model, self._originals()

    def _use_hparams(self, train_ds: Facts | Sequence[Any] | None, other: Mapping[str, Any]) -> None:
        """Take over what a script has changed, and say which arguments count for nothing."""
        values = values_of(self.hparams)
        for name, value in other.items():
            if name == "loc_prompts" and value and isinstance(self.config, WISEConfig):
                values.setdefault("irrelevant_texts", list(value))
            elif name != "keep_original_weight" and value is not None:  # the original weights are always kept
                logger.warning("the argument %r has no meaning here and is ignored", name)
        if train_ds is not None:
            values.setdefault("demonstrations", demonstrations_of(train_ds))
        if values != self._seen:
            self._seen = values
            self.config = convert_hparams(values).config
            self.model.set_method(self.config)

    def _originals(self) -> dict[str, torch.Tensor]:
        accounts = self.model.ledger.accounts
        return {key: account.original.clone() for key, account in accounts.items()}


class BatchEditor(BaseEditor):
    """A `BaseEditor` whose `edit` is `batch_edit`."""

    edit = BaseEditor.batch_edit


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
) -> tuple[EditableModel, dict[str, torch.Tensor]]:
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
        The edited model (``rollback("all")`` undoes) and the original weights by parameter name.
    """
    if not isinstance(model, EditableModel):
        model = EditableModel(deepcopy(model) if copy else model, convert_hparams(values_of(hparams)).config, tok)
    elif copy:
        raise NoCounterpartError("copy=True: an EditableModel is not copied; rollback() takes its edits back")
    editor = BaseEditor(hparams, model)
    editor.model.edit(from_easyedit_requests(requests))
    return editor.model, editor._originals()
