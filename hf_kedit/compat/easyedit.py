"""EasyEdit's `BaseEditor` on top of this library: an existing script changes one import.

    from hf_kedit.compat.easyedit import BaseEditor, ROMEHyperParams   # instead of: from easyeditor import …

Arguments, the layout of the metrics and the three return values are EasyEdit's. The numbers are this library's: its
methods, its protocols (teacher forced), its reading of the hyperparameters. docs/migrate.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..config import read_mapping
from ..config.easyedit import convert_hparams
from ..data.easyedit import from_easyedit
from ..errors import ConfigError
from ..evaluation import evaluate_edits
from ..logging import get_logger
from ..model import EditableModel
from ..requests import EditRequest

logger = get_logger(__name__)
Metrics = list[dict[str, Any]]


class HyperParams(SimpleNamespace):
    """The content of an hparams file as attributes, which a script may change before it makes an editor."""

    @classmethod
    def from_hparams(cls, path: str | Path) -> HyperParams:
        """Read a YAML file; ``.yaml`` may be left out.

        Raises:
            ConfigError: if it cannot be read.
        """
        file = Path(path)
        return cls(**read_mapping(file if file.suffix in (".yaml", ".yml") else file.with_name(file.name + ".yaml")))


# EasyEdit has a class per method. What a file is for, its alg_name says.
AlphaEditHyperParams = COREHyperParams = DINMHyperParams = DeferHyperParams = EMMETHyperParams = HyperParams
FTHyperParams = GraceHyperParams = IKEHyperParams = KEHyperParams = KNHyperParams = LoRAHyperParams = HyperParams
MALMENHyperParams = MELOHyperParams = MEMITHyperParams = MENDHyperParams = PMETHyperParams = HyperParams
QLoRAHyperParams = R_ROMEHyperParams = ROMEHyperParams = SERACHparams = SimIEHyperParams = HyperParams
TPatcherHyperParams = UltraEditHyperParams = WISEHyperParams = HyperParams


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
        hparams: a `HyperParams`, or a mapping with the same content.
        model: a loaded `EditableModel` to edit, instead of loading ``model_name``.

    Raises:
        ConfigError: if the hyperparameters are unusable or name no model.
    """

    def __init__(self, hparams: HyperParams | Mapping[str, Any], model: EditableModel | None = None):
        values = dict(hparams) if isinstance(hparams, Mapping) else dict(vars(hparams))
        converted = convert_hparams(values)
        for key, reason in converted.ignored.items():
            logger.info("%s: ignored: %s", key, reason)
        self.batch_size = int(values.get("batch_size") or 1)
        self.config = converted.config
        if model is not None:
            self.model = model.set_method(converted.config)
        elif converted.model_name:
            options: dict[str, Any] = {"dtype": torch.float16 if values.get("fp16") else torch.float32}
            if converted.config.edit_type == "qlora":
                options["quantization_config"] = _quantisation(values)
            self.model = EditableModel.from_pretrained(converted.model_name, converted.config, **options)
        else:
            raise ConfigError("the hyperparameters name no model (model_name)")

    @classmethod
    def from_hparams(cls, hparams: HyperParams | Mapping[str, Any]) -> BaseEditor:
        """Load the model that the hyperparameters name."""
        return cls(hparams)

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
        **other: Any,
    ) -> tuple[Metrics, EditableModel, dict[str, torch.Tensor]]:
        """Make one edit per prompt and measure it.

        With ``sequential_edit`` the edits are made one after the other, all stay, and all are measured at the end.
        Without it each is made on the original model, measured and undone, except the last, which stays.

        Returns:
            One dict per request in EasyEdit's layout; the edited model (``rollback("all")`` undoes); and the
            original weights of what the edits changed, by parameter name.

        Raises:
            RequestError: for an unusable request.
        """
        requests = from_easyedit(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        together = sequential_edit or len(requests) == 1
        report = self._measure(requests, "sequential" if together else "single", None, verbose, test_generation, other)
        if not together:
            self.model.edit(requests[-1], show_progress=verbose)
        return report, self.model, self._originals()

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
        **other: Any,
    ) -> tuple[Metrics, EditableModel, dict[str, torch.Tensor]]:
        """Make the edits in batches of the hyperparameters' ``batch_size``; see `edit`.

        With ``sequential_edit`` the batches build on each other and are measured at the end. Without it each batch is
        measured on its own, and the last one stays.
        """
        requests = from_easyedit(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject
        )
        size = self.batch_size
        together = sequential_edit or len(requests) <= size
        setting = "sequential" if together else "batch"
        report = self._measure(requests, setting, size, verbose, test_generation, other)
        if not together:
            self.model.edit(requests[(len(requests) - 1) // size * size :], show_progress=verbose)
        return report, self.model, self._originals()

    def _measure(
        self,
        requests: Sequence[EditRequest],
        setting: Any,
        batch_size: int | None,
        verbose: bool,
        test_generation: bool,
        other: Mapping[str, Any],
    ) -> Metrics:
        for name in other:
            logger.warning("the argument %r has no meaning here and is ignored", name)
        protocols = ["teacher_forced", "fluency"] if test_generation else "teacher_forced"
        report = evaluate_edits(
            self.model,
            list(requests),
            setting,
            batch_size,
            protocols,
            progress=verbose,
            keep_edits=setting == "sequential",
        )
        return report.to_easyedit()

    def _originals(self) -> dict[str, torch.Tensor]:
        accounts = self.model.ledger.accounts
        return {key: account.original.clone() for key, account in accounts.items()}
