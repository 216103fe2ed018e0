"""EasyEdit's data classes as doors to `load_edit_dataset`: the same files, read by this library, under their keys.

A row is the dict that EasyEdit's scripts index (``row["prompt"]``, ``row["portability_r"]`` …). What
makes an object is the same for all: a path, perhaps a number of rows, and hyperparameters that do not matter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, overload

from ...data import load_edit_dataset
from ...data.normalise import fill_slots
from ...errors import DataError
from ...requests import EditRequest, load_requests
from ...storage.records import read_records

Row = dict[str, Any]
ENDS = {"Llama3-8B-Instruct": "<|eot_id|>", "Qwen2.5-7B-Instruct": "<|im_end|>"}
"""Part of a model's name → what scripts cut off at the end of an answer; see `without_end`."""
GENERAL = ("onlyQ", "otherA", "otherQ", "otherAQ")
"""In which ways SafeEdit asks about an edited behaviour elsewhere, in EasyEdit's order."""


class Facts(Sequence[Row]):
    """A file of facts.

    Args:
        data_dir: the file, or for some sets its folder.
        size: take the first so many.
        config: not used; texts become tokens where a model is.
        other: arguments of a class that has some; see there.

    Raises:
        DataError: if there is no such file, or it is another set's.
        RequestError: for an unusable row.
    """

    name: ClassVar[str] = ""

    def __init__(self, data_dir: str | Path, size: int | None = None, config: Any = None, **other: Any):
        self.config, self.given = config, other
        self.part = self.source(Path(data_dir), other)
        path = self.file(Path(data_dir), other)
        self.table = load_edit_dataset(self.part, path=path, limit=size, **self.options(self.part, other))
        self._rows = [{"case_id": number, **self.record(row)} for number, row in enumerate(self.table)]

    def source(self, path: Path, other: Mapping[str, Any]) -> str:
        """Name of the data set that the file belongs to."""
        return self.name

    def options(self, source: str, other: Mapping[str, Any]) -> dict[str, Any]:
        """Options of that data set."""
        return {}

    def file(self, path: Path, other: Mapping[str, Any]) -> Path:
        """Where the file is."""
        return path

    def record(self, row: Row) -> Row:
        """EasyEdit's keys of one row."""
        near = next(iter(row["locality"]), None)
        return {
            "prompt": row["prompt"],
            "subject": row["subject"],
            "target_new": row["target_new"],
            "ground_truth": next(iter(row["ground_truth"]), None),
            "rephrase_prompt": next(iter(row["rephrase_prompts"]), None),
            "locality_prompt": near and near["prompt"],
            "locality_ground_truth": near and _answer(near),
        }

    def requests(self) -> list[EditRequest]:
        """The rows as this library's requests."""
        return load_requests(self.table.remove_columns("id"))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._rows[index]


class ZsreDataset(Facts):
    """ZsRE as MEND uses it."""

    name = "zsre"


class KnowEditDataset(Facts):
    """KnowEdit; the sections are lists of probes by axis."""

    name = "knowedit/wiki_counterfact"  # its sets share one layout

    def record(self, row: Row) -> Row:
        """Sections by the first letters of their axes."""
        near, far = _axes(row["locality"]), _axes(row["portability"])
        return {
            **super().record(row),
            "portability_r": far.get("Reasoning"),
            "portability_s": far.get("Subject_Aliasing"),
            "portability_l": far.get("Logical_Generalization"),
            "locality_rs": near.get("Relation_Specificity"),
            "locality_f": near.get("Forgetfulness"),
        }


class WikiRecentDataset(KnowEditDataset):
    """The part of KnowEdit with recent facts."""

    name = "knowedit/wiki_recent"


class CounterFactDataset(Facts):
    """CounterFact: flat, of the authors, or of AKEW, whichever the file holds; AKEW's other files as well."""

    def source(self, path: Path, other: Mapping[str, Any]) -> str:
        """By the first record."""
        with closing(read_records(str(path))) as records:
            first = next(iter(records), None)
        rewrite = first.get("requested_rewrite") if isinstance(first, Mapping) else None
        if isinstance(rewrite, list):
            return "akew/mquake_cf"
        if not isinstance(rewrite, Mapping):
            return "counterfact_flat"
        return "akew/counterfact" if {"prompt_full", "fact_new_uns"} & rewrite.keys() else "counterfact"

    def record(self, row: Row) -> Row:
        """AKEW's have a paragraph on the fact, what it says besides, and further questions."""
        extra, asked = row["extra"] or {}, [p for p in row["portability"] if p["name"] == "Multi_Hop"]
        wordings = list(row["rephrase_prompts"]) or [q for q in [extra.get("question")] if q]
        beside = extra.get("triplets") or [
            {"prompt": p["prompt"], "subject": row["subject"], "target": _answer(p)} for p in row["locality"]
        ]
        return {
            **super().record(row),
            "descriptive_prompt": f"Tell about {row['subject']} and {row['target_new']}.",
            "descriptive_target": extra.get("paragraph"),
            "portability_data": [p["prompt"] for p in asked] or wordings,
            "portability_answer": _answer(asked[0]) if asked else row["target_new"],
            "locality_data": beside,
        }


class CKnowEditDataset(Facts):
    """CKnowEdit; the categories share one layout."""

    name = "cknowedit/history"

    def record(self, row: Row) -> Row:
        """Probes are ``{"prompt": …, "answer": …}``."""
        return {
            **super().record(row),
            "target_old": next(iter(row["ground_truth"]), None),
            "rephrase": list(row["rephrase_prompts"]),
            "portability": _answered(row["portability"]),
            "locality": _answered(row["locality"]),
        }


class WikiBigEditDataset(Facts):
    """WikiBigEdit."""

    name = "wikibigedit/20240201_20240220"  # its time steps share one layout

    def record(self, row: Row) -> Row:
        """One text per key."""
        near, far = next(iter(row["locality"]), None), next(iter(row["portability"]), None)
        wordings = [*row["rephrase_prompts"], None, None]
        return {
            **super().record(row),
            "rephrase": wordings[0],
            "portability_personas": wordings[1],
            "portability_hop": far and far["prompt"],
            "portability_hop_ans": far and _answer(far),
            "locality": near and near["prompt"],
            "locality_ans": near and _answer(near),
        }


class LongFormEditDataset(WikiBigEditDataset):
    """LEME; ``dataset_type`` is ``zsre`` or ``counterfact``."""

    def source(self, path: Path, other: Mapping[str, Any]) -> str:
        """By ``dataset_type``."""
        return _part("leme", other, {"zsre": "zsre", "counterfact": "counterfact"}, "zsre")

    def record(self, row: Row) -> Row:
        """CounterFact's wordings and neighbours are lists."""
        if self.part != "leme/counterfact":
            return super().record(row)
        return {**super().record(row), "rephrase": list(row["rephrase_prompts"]), **_texts("locality", row)}


class AKEWUnifiedDataset(Facts):
    """AKEW and UnKE; ``dataset_type`` is ``counterfact``, ``mquake``, ``wikiupdate`` or ``unke``."""

    def source(self, path: Path, other: Mapping[str, Any]) -> str:
        """By ``dataset_type``."""
        parts = {"counterfact": "counterfact", "mquake": "mquake_cf", "wikiupdate": "wikiupdate"}
        return "unke" if other.get("dataset_type") == "unke" else _part("akew", other, parts, "counterfact")

    def options(self, source: str, other: Mapping[str, Any]) -> dict[str, Any]:
        """Paragraphs instead of answers, if asked for."""
        akew = source.startswith("akew/") and other.get("use_unstructured_data")
        return {"edit_input": "unstructured"} if akew else {}

    def file(self, path: Path, other: Mapping[str, Any]) -> Path:
        """Scripts that edit paragraphs name the folder of all sets."""
        return path / _FILES[self.part] if other.get("use_unstructured_data") and os.path.isdir(path) else path

    def record(self, row: Row) -> Row:
        """Texts, those of CounterFact as lists; of paragraphs the questions about them, too."""
        if self.given.get("use_unstructured_data"):
            return super().record(row) | self._questions(row)
        question = (row["extra"] or {}).get("question")
        wordings, far = list(row["rephrase_prompts"]) or [question] * bool(question), row["portability"]
        near = _texts("locality", row)
        if self.part != "akew/counterfact":
            wordings = wordings if self.part == "akew/wikiupdate" else wordings[:1]
            near = {key: next(iter(texts), None) for key, texts in near.items()}
        return {
            **super().record(row),
            "rephrase": wordings,
            "portability_prompt": [p["prompt"] for p in far] or None,
            "portability_ground_truth": [_answer(p) for p in far] or None,
            **near,
        }

    def _questions(self, row: Row) -> Row:
        """What unstructured editing asks: on details, at most five triplets of the paragraph."""
        far, triplets = row["portability"], (row["extra"] or {}).get("triplets")
        asked = [(probe["prompt"], _answer(probe)) for probe in far]
        if triplets:
            asked = [(fill_slots(one["prompt"], one["subject"]), one["target"]) for one in triplets[:5]]
        model = str(self.given.get("model_name"))
        return {
            "id": row["id"],
            "question": row["prompt"],
            "para_question": next(iter(row["rephrase_prompts"]), row["prompt"]),
            "answer": row["target_new"] + next((end for name, end in ENDS.items() if name in model), ""),
            "sub_question": [question for question, _ in asked] or [row["prompt"]],
            "sub_answer": [answer for _, answer in asked],
        }


class AKEWDataset(CounterFactDataset):
    """AKEW's version of CounterFact."""

    name = "akew/counterfact"


class MQuAKEDataset(KnowEditDataset):
    """MQuAKE."""

    name = "mquake/cf"


class SafetyDataset(Facts):
    """SafeEdit."""

    name = "safeedit"

    def record(self, row: Row) -> Row:
        """The answer that is not wanted, and the prompts that the behaviour is asked at."""
        return {
            **super().record(row),
            "ground_truth": row["target_neg"],
            "general_prompt": [text for name in GENERAL if (text := row["extra"]["general_prompts"].get(name))],
        }


class PersonalityDataset(Facts):
    """PersonalityEdit."""

    name = "personalityedit"

    def record(self, row: Row) -> Row:
        """The topic and the trait."""
        extra = row["extra"]
        return {**super().record(row), "ent": row["subject"], "target_personality": extra["target_trait"]}


class SanitizationTrainDataset(Facts):
    """Facts of TriviaQA that are to be forgotten.

    ``template`` is written around every question; ``specify_answers`` chooses one answer, ``"all"`` every one.
    """

    name = "knowedit/sanitation"

    def __init__(self, data_dir: str | Path, size: int | None = None, config: Any = None, **other: Any):
        super().__init__(data_dir, None, config, **other)
        wanted = str(other.get("specify_answers") or "all").lower()
        self._chosen = [
            number for number, row in enumerate(self._rows) if wanted in ("all", str(row["ground_truth"]).lower())
        ][:size]
        if not self._chosen:
            raise DataError(f"no row is about {wanted!r}")
        self._rows = [self._rows[number] for number in self._chosen]

    def record(self, row: Row) -> Row:
        """In the template."""
        record = super().record(row)
        texts = {key: self._asked(record[key]) for key in ("prompt", "locality_prompt") if record[key]}
        return record | texts

    def requests(self) -> list[EditRequest]:
        """The chosen rows in the template."""
        rows = super().requests()
        return [
            replace(
                rows[number],
                prompt=self._asked(rows[number].prompt),
                locality={
                    axis: [replace(probe, prompt=self._asked(probe.prompt)) for probe in probes]
                    for axis, probes in rows[number].locality.items()
                },
            )
            for number in self._chosen
        ]

    def _asked(self, question: str) -> str:
        return str(self.given.get("template") or "{}").format(question)


class CaptionDataset(Facts):
    """Captions of MMEdit: texts and names of pictures."""

    name = "mmedit/caption"


class VQADataset(Facts):
    """Questions of MMEdit: texts and names of pictures."""

    name = "mmedit/vqa"


class ComprehendEditDataset(Facts):
    """ComprehendEdit: texts and names of pictures."""

    name = "comprehendedit"


_FILES = {
    "akew/counterfact": "AKEW/CounterFact.json",
    "akew/mquake_cf": "AKEW/MQuAKE-CF.json",
    "akew/wikiupdate": "AKEW/WikiUpdate.json",
    "unke": "UnKE/final_data_v3.json",
}


def without_end(answer: str) -> str:
    """An answer without the mark that `AKEWUnifiedDataset` has put at its end; methods write their own."""
    for end in ENDS.values():
        answer = answer.removesuffix(end)
    return answer


def _part(family: str, other: Mapping[str, Any], parts: Mapping[str, str], default: str) -> str:
    kind = str(other.get("dataset_type") or default).lower()
    if kind not in parts:
        raise DataError(f"dataset_type must be one of {', '.join(parts)}, not {kind!r}")
    return f"{family}/{parts[kind]}"


def _answer(probe: Mapping[str, Any]) -> str | None:
    """The first wording of a probe's first answer."""
    return next((text for group in probe["ground_truth"] for text in group), None)


def _texts(section: str, row: Row) -> Row:
    """The probes of a section as prompts and answers, under EasyEdit's keys."""
    probes = row[section]
    return {section: [probe["prompt"] for probe in probes], f"{section}_ans": [_answer(probe) for probe in probes]}


def _axes(probes: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Axis → prompts with their answers; scripts take the first of the first."""
    found: dict[str, list[Row]] = {}
    for probe in probes:
        answers = [list(group) for group in probe["ground_truth"] if group] or [[""]]
        found.setdefault(probe["name"], []).append({"prompt": probe["prompt"], "ground_truth": answers})
    return found


def _answered(probes: Sequence[Mapping[str, Any]]) -> list[Row] | None:
    return [{"prompt": probe["prompt"], "answer": _answer(probe)} for probe in probes] or None
