"""EasyEdit's editor of models that see: `MultimodalEditor`, on top of the scenario `pictures`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import RequestError
from ...evaluation import evaluate_edits, load_scenario
from ...evaluation.measures.metrics import case_mean
from ...evaluation.scenarios.pictures import PICTURES
from ...requests import EditRequest
from .editor import BaseEditor, Edited
from .extras import Row
from .facts import Facts
from .originals import Originals

_SECTIONS = {"rewrite": ("rewrite_acc",), "rephrase": ("rephrase_acc",), "portability": ("portability_acc",)}
_NUMBERS = {
    "m_generality": ("image_rephrase_acc", "rephrase_image_acc"),  # it spells this in two ways
    "t_locality": ("locality_acc",),
    "m_locality": ("multimodal_locality_acc",),
}
"""Section of the report, number of the scenario → EasyEdit's names."""
_AXES = {"text": "text", "vision": "multimodal"}
"""Its axes of ``locality_inputs`` → those of the data sets."""


class MultimodalEditor(BaseEditor):
    """Edits what a model says of pictures. Any model that `EditableModel` loads with its processor will do."""

    def edit(  # type: ignore[override]
        self,
        prompts: str | Sequence[str],
        targets: str | Sequence[str] | None = None,
        image: Any = None,
        file_type: str | Sequence[str] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        rephrase_image: Any = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        keep_original_weight: bool = False,
        verbose: bool = True,
        sequential_edit: bool = False,
        **other: Any,
    ) -> Edited:
        """Make one edit per prompt and measure it; see `BaseEditor.edit`.

        Args:
            prompts: one text, or one per edit; likewise the arguments that follow.
            targets: the new answers; ``target_new``, as EasyEdit's README has it, is the same.
            image: pictures (paths, PIL images …); of several pictures for one edit, a list in the list. Relative paths
                start from the hyperparameters' ``coco_image`` where they name one.
            file_type: anything but ``"video"``: give its frames as a list of pictures.
            rephrase_prompts: the questions in other words.
            rephrase_image: other pictures of the same things; relative paths start from ``rephrase_image``.
            locality_inputs: ``text`` and ``vision``: ``prompt``, ``ground_truth`` and, for the latter, ``image``.
            keep_original_weight: no meaning; they always are.
            verbose: show progress.
            sequential_edit: all edits stay, and are measured at the end.
            other: ``subject``, what the questions are about; otherwise as in `BaseEditor.edit`.

        Returns:
            As `BaseEditor.edit`; ``pre`` and ``post`` hold 0-d tensors under EasyEdit's names (``rewrite_acc``,
            ``rephrase_acc``, ``image_rephrase_acc``, and after the edit ``locality_acc``,
            ``multimodal_locality_acc``), as its scripts read them. Locality is agreement where the answer stands.

        Raises:
            RequestError: for an unusable request, or arguments that are not as many as the prompts.
        """
        targets = other.pop("target_new", None) if targets is None else targets
        for name, value in (("targets", targets), ("image", image)):
            if value is None:
                raise RequestError("is missing", field=name)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        count = len(texts)
        kinds = _each(file_type, count, "file_type")
        if "video" in kinds:
            raise RequestError("a video is edited as a list of its frames", row=kinds.index("video"), field="image")
        columns = {
            "prompt": texts,
            "target_new": _each(targets, count, "targets"),
            "image": self._pictures(image, count, "image", "coco_image"),
            "image_rephrase": self._pictures(rephrase_image, count, "rephrase_image", "rephrase_image"),
            "rephrase_prompts": [
                [t] if isinstance(t, str) else t for t in _each(rephrase_prompts, count, "rephrase_prompts")
            ],
            "locality": self._probes(locality_inputs, count),
            "subject": _each(other.pop("subject", None), count, "subject"),
        }
        requests = [
            EditRequest.from_dict({name: values[i] for name, values in columns.items()}, row=i) for i in range(count)
        ]
        train_ds = other.pop("train_ds", None)
        return self._measured(requests, sequential_edit, verbose, train_ds, other)

    def edit_dataset(
        self, ds: Facts, keep_original_weight: bool = False, verbose: bool = True, **other: Any
    ) -> Edited:
        """`edit` of all rows of a data set, each on the original model."""
        train_ds = other.pop("train_ds", None)
        return self._measured(ds.requests(), False, verbose, train_ds, other)

    def _measured(
        self,
        requests: Sequence[EditRequest],
        sequential: bool,
        verbose: bool,
        train_ds: Facts | Sequence[Any] | None,
        other: Mapping[str, Any],
    ) -> Edited:
        self._use_hparams(train_ds, other)
        together = sequential or len(requests) == 1
        scenario = load_scenario("pictures", generated=False, images=self._seen.get("coco_image"))
        report = evaluate_edits(
            self.model,
            list(requests),
            "sequential" if together else "single",
            scenario=scenario,
            progress=verbose,
            keep_edits=together,
        )
        if not together:
            self.model.edit(scenario.requests(requests[-1:]), show_progress=verbose)
        rows: list[Row] = []
        for result in report.chosen("pictures"):
            row: Row = {"case_id": result.number, "requested_rewrite": result.request}
            for half, measured in result.halves.items():
                found = {name: case_mean(measured.scores.get(name)) for name in _SECTIONS}
                found |= {name: case_mean(measured.numbers.get(PICTURES, {}).get(name)) for name in _NUMBERS}
                named = {key: found[name] for name, keys in (_SECTIONS | _NUMBERS).items() for key in keys}
                row[half] = {key: torch.tensor(value) for key, value in named.items() if value is not None}
            rows.append({**row, "time": result.cost.share_of_call})
        return rows, self.model, Originals(self.model)

    def _pictures(self, given: Any, count: int, name: str, root: str) -> list[Any]:
        """One picture, or list of pictures, for each edit; paths from the folder that the hyperparameters name."""
        folder = self._seen.get(root)

        def placed(one: Any) -> Any:
            if isinstance(one, (list, tuple)):
                return [placed(each) for each in one]
            inside = Path(str(folder)) / str(one) if folder and isinstance(one, (str, Path)) else None
            return str(inside) if inside is not None and os.path.isfile(inside) else one

        return [placed(one) for one in _each(given, count, name)]

    def _probes(self, inputs: Mapping[str, Mapping[str, Any]] | None, count: int) -> list[dict[str, Any]]:
        probes: list[dict[str, Any]] = [{} for _ in range(count)]
        for axis, given in (inputs or {}).items():
            prompts = _each(given["prompt"], count, f"locality_inputs[{axis!r}]")
            answers = _each(given.get("ground_truth"), count, f"locality_inputs[{axis!r}]")
            images = self._pictures(given.get("image"), count, f"locality_inputs[{axis!r}]", "coco_image")
            for row, prompt, answer, image in zip(probes, prompts, answers, images, strict=True):
                if prompt:
                    known = {} if answer is None else {"ground_truth": answer}
                    seen = {} if image is None else {"image": image}
                    row[_AXES.get(axis, axis)] = [{"prompt": prompt, **known, **seen}]
        return probes


def _each(value: Any, count: int, name: str) -> list[Any]:
    """One value for each edit: a list of as many, or the same for all where it is a text, a picture or ``None``."""
    if not isinstance(value, (list, tuple)):
        if value is not None and count > 1 and name != "file_type":
            raise RequestError(f"is one value for {count} edits", field=name)
        return [value] * count
    if len(value) != count:
        raise RequestError(f"has {len(value)} values for {count} edits", field=name)
    return list(value)
