"""Auto: every edit on its own, on the untouched model, and switched on where a prompt asks for it.

What one edit does alone is known to be good; what goes wrong is what many edits do to each other, and to prompts that
have nothing to do with them. So edits are not piled up. Each one is computed by another method (its *base method*, by
default ROME) as if it were the only one, and kept as what this method would do to the model: a low-rank change,

    ΔW_i = left_i right_iᵀ        at one or several linear layers,

or (PROMPT) the fact as a text, or both; and no weight is touched. Before the model runs, a router reads each row's
prompt (books/router.py) and finds the one edit that it asks for, or none:

    y = W x + left_i (right_iᵀ x)    at every position of a row that edit i claims, and that row behind text i
    y = W x                          bit for bit, in every other row

Prompts that name the subject and those that do not (the model's states tell them) may get solutions of two base
methods: what is written for the place of the subject's tokens has nothing to act on in the latter.

What this gives: edit 10,000 is as good as edit 1, taking one back is dropping a row, order does not matter, and
unrelated prompts have the base model itself. What it costs: a look at the text of every prompt, and a product with
two thin matrices in rows that are claimed (or reading the fact before them). What it cannot: questions that nothing
tells to be about the subject stay with the base model, and so do conclusions that the base method does not draw.

Routing between untouched weights and stored edits is the idea of SERAC (arXiv 2206.06520), MELO (arXiv 2312.11795)
and KEDAS (arXiv 2508.01302); new here are that the stored edit is any method's own solution, and the router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, NonNegativeInt

from ..books.retrieval import DENSE, DENSE_MODEL, MODEL
from ..books.router import Address
from ..books.site_book import SiteEntry
from ..config import EditConfig, ModelProfile
from ..config.hparams import find_hparams
from ..embedded import is_there
from ..engine.lowrank import Factors
from ..errors import ConfigError, EditFailedError, RequestError, UnsupportedModelError, WeightError, shown
from ..requests import EditRequest, in_row
from .auto_memory import UNNAMED, WORDS, Compared, RoutedChange, RoutedChanges, word_vectors
from .auto_shelf import Shelf, Solution, sizes_of
from .base import BothFormats, Capabilities, Method, Outcome, Workbench, WrappingConfig, method_class, register_method
from .ike import Prompt, PromptConfig, check_room, new_fact


@dataclass
class AutoMethodConfig(WrappingConfig):
    """Hyperparameters of `auto`; those of the method that computes the edits are in ``base``.

    Args:
        base: method that computes an edit: one of weights whose changes have a low rank (ROME, MEMIT, LoRA …), or
            PROMPT, by its name or config.
        base_unnamed: another one for prompts that do not name the edit's subject, which only ``states`` can know
            (``"model"`` then, if none are named); ``None``: the same.
        in_context: read claimed rows behind the fact as a text, too, as PROMPT does: a change and a text help each
            other. Has no meaning where the base method is PROMPT.
        rank: columns that are kept for an edit at each layer, at most; ``None``: those of the first edit. A change of
            a larger rank is refused.
        encoder: what compares wordings: ``"dense"``, any other embedding retriever, or ``"words"``, the word vectors
            of the model itself; ``None``: ``"dense"`` where it has been set up (`make real`), else ``"words"``.
        slack: by how much a prompt may be nearer to something else that people ask about a subject than to the edit's
            wordings, and is still taken to ask for the edit (`EditRouter`); ``None``: by encoder.
        states: compare the unedited model's states at the last tokens of prompts, too: ``"model"``, or
            ``"model:<layer>"``. Costs a pass over every new prompt; what it is worth to a model has to be measured.
        alike: least cosine of two states that ask for the same.
    """

    edit_type: ClassVar[str] = "auto"

    base_unnamed: Any = None
    in_context: bool = False
    rank: NonNegativeInt | None = None
    encoder: str | None = None
    slack: float | None = None
    states: str | None = None
    alike: Annotated[float, Field(gt=0, le=1)] = 0.8

    @classmethod
    def from_earlier(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """``base`` was ``payload`` and ``payload_settings``, and its layers and statistics stood beside them."""
        if not {"payload", "payload_settings"} & set(values):
            return values
        if "base" in values:
            raise ConfigError("auto: 'payload' is the old name of 'base'; give only one of them")
        inner = [n for n in values if n.startswith("stats_")]
        settings = {n: values[n] for n in inner if values[n] is not None} | dict(values.get("payload_settings") or {})
        left = {n: v for n, v in values.items() if n not in (*inner, "payload", "payload_settings")}
        return {**left, "base": {"edit_type": values.get("payload") or "rome", **settings}}

    def validate(self) -> None:
        """Bring the second base method's config into one form, too."""
        super().validate()
        if self.base_unnamed is None:
            return
        self.states = self.states or MODEL  # without states no prompt is claimed that does not name its subject
        self.base_unnamed = self._as_dict("base_unnamed")
        self.check_base(EditConfig.from_dict(self.base_unnamed))

    @property
    def reads_files(self) -> bool:
        """What a file says was chosen for the base method in it: whoever names another one gets none of the rest."""
        return "base" not in self.given

    @property
    def bases(self) -> list[EditConfig]:
        """The configs of the base methods; where there are two, the second is for prompts that name no subject."""
        return [EditConfig.from_dict(base) for base in (self.base, self.base_unnamed) if base is not None]

    @property
    def in_words(self) -> str:
        """The method, and those inside."""
        text = ", with the fact in front" if self.in_context else ""
        return f"{self.edit_type} ({'; subject not named: '.join(base.in_words for base in self.bases)}{text})"

    def check_base(self, base: EditConfig) -> None:
        """A method whose edits can be kept beside the weights, one by one."""
        kind = method_class(base)
        can = kind.capabilities
        if isinstance(base, PromptConfig) and kind is Prompt:
            if base.select or base.scope == "always":
                raise ConfigError(
                    "auto's own router decides which prompts a fact is put in front of: leave out 'select' and 'scope'"
                    " of its base method"
                )
        elif can.kind != "weights" or not can.low_rank or can.needs_training:
            raise ConfigError(
                f"auto cannot switch what {can.name} does on and off: its base method changes weights, by a small"
                " rank, and needs no trained editor (ROME, R-ROME, MEMIT and its relatives, LoRA), or is PROMPT"
            )
        if getattr(base, "sequence", "batches") == "joint":
            raise ConfigError("auto keeps edits apart: sequence='joint' of its base method has no meaning here")

    def complete(self, profile: ModelProfile, *, files: bool = True) -> Self:
        """Fill in the base methods' configs, and the best encoder that there is."""
        full = super().complete(profile, files=files)
        encoder = full.encoder or (DENSE if is_there(DENSE_MODEL) else WORDS)
        slack = SLACK.get(encoder, SLACK[DENSE]) if full.slack is None else full.slack
        unnamed = [base.complete(profile, files=files).to_dict() for base in full.bases[1:]]
        return replace(full, encoder=encoder, slack=slack, base_unnamed=unnamed[0] if unnamed else None)

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """What an edit is, and how much is taken to ask for it."""

        def settings(name: str) -> dict[str, Any]:
            """Of a base method, as for a user who names it: from its own file for the model, if there is one."""
            base, known = EditConfig.from_dict({"edit_type": name}), find_hparams(name, profile.name) is not None
            return base.complete(profile).to_dict() if known else {"edit_type": name}

        return {
            "base": [settings(name) for name in ("core", "lora", "prompt", "memit", "namet")],
            "base_unnamed": [settings(name) for name in ("prompt", "lora")],
            "states": [MODEL],
            "in_context": [True],
            "slack": [0.1, 0.5],
            "alike": [0.7],
        }


SLACK = {DENSE: 0.3, WORDS: 0.3}
"""Default slack, by encoder."""


@register_method
class Auto(Method):
    """Routed edits."""

    config_class = AutoMethodConfig
    both_formats: ClassVar[BothFormats | None] = "itself"
    apart = True
    capabilities = Capabilities(
        name="auto",
        kind="adapter",
        batch=True,
        sequential=True,
        needs_subject=True,
        low_rank=False,
        paper="this library; see docs/methods/auto.md",
        summary="each edit alone on the untouched model, switched on where a prompt asks for it",
    )
    config: AutoMethodConfig

    def __init__(self, bench: Workbench, config: EditConfig):
        super().__init__(bench, config)
        self.bases = [method_class(base)(bench, base) for base in self.config.bases]

    def edited_modules(self) -> list[str]:
        """No weight is edited."""
        return []

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check that the base method can edit the requests, and that they name their subjects."""
        super().check(requests)
        two = any(request.prompt_format == "both" for request in requests)
        for base in self.bases:
            if two and base.both_formats != "itself":
                raise ConfigError(
                    f"auto with {base.capabilities.name} edits in one format at a time: prompt_format='plain' or"
                    " 'chat', not 'both'"
                )
            with self.bench.sites.disabled():
                base.check(requests)
        if self.config.in_context:
            check_room(self.bench, requests, self._fact, self.config.separator)
        for request in requests:
            in_row(self._address, request)

    def fetch(self) -> None:
        """What the base methods read."""
        for base in self.bases:
            base.fetch()

    def prepare(self) -> None:
        """What the base methods prepare."""
        with self.bench.sites.disabled():
            for base in self.bases:
                base.prepare()

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Compute every edit as if it were the only one."""
        found = [self._found(base, requests) for base in self.bases]
        memory = self._memory([[solution for solution, _ in own] for own in found])
        entries, diagnostics = [], []
        for request, own in zip(requests, zip(*found, strict=True), strict=True):
            (first, numbers), *unnamed = own
            change, unclaimed = self._addressed(request, memory, [solution for solution, _ in own])
            entries.append(SiteEntry(memory, change))
            report = numbers | {"base": first.base, "unclaimed": unclaimed}
            for solution, others in unnamed:
                report |= {"base_unnamed": solution.base, **{f"{UNNAMED}_{k}": v for k, v in others.items()}}
            diagnostics.append(report)
        return Outcome([], diagnostics, entries)

    # ------------------------------------------------------------------ inside

    def _addressed(
        self, request: EditRequest, memory: RoutedChanges, solutions: Sequence[Solution]
    ) -> tuple[RoutedChange, list[str]]:
        """An edit with what it answers to, and those of its wordings that the router would not know it by."""
        address = self._address(request)
        wordings = _wordings(request)
        read = self._read if memory.compared is not None else None
        state = None if read is None else read([request.plain_prompt])
        alone = memory.router.empty().with_addresses([address], states=state)
        routes = alone.route(wordings, read)
        unclaimed = [wording for wording, route in zip(wordings, routes, strict=True) if route is None]
        return RoutedChange(address, alone.views.tensor, solutions, state), unclaimed

    def _read(self, prompts: Sequence[str]) -> torch.Tensor:
        """The unedited model's states that are compared, ``[prompts, d]``."""
        assert self.config.states is not None
        reader = self.bench.reader
        return reader.states(prompts, reader.layer_of(self.config.states))

    def _compared(self) -> Compared | None:
        """The states that are compared.

        Raises:
            ConfigError: if there is no such layer.
        """
        if self.config.states is None:
            return None
        layer = self.bench.reader.layer_of(self.config.states)
        return Compared(f"model:{layer}", self.bench.anatomy.layer(layer).path, self.config.alike)

    def _address(self, request: EditRequest) -> Address:
        """What an edit answers to: its wordings, under its subject's names.

        Raises:
            RequestError: if the request does not name its subject, or its other names are no texts.
        """
        begin, end = request.plain_span()
        given = request.metadata.get("aliases", [])
        others = [given] if isinstance(given, str) else given
        if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
            raise RequestError(f"aliases must be a list of names, not {shown(given)}", field="metadata")
        address = Address.of(str(request.id), _wordings(request), [request.plain_prompt[begin:end], *others])
        if not address.views:
            raise RequestError(f"{shown(request.subject)} has no letters or digits to be known by", field="subject")
        return address

    def _fact(self, request: EditRequest) -> str:
        """The text that rows which an edit claims are read behind, with ``in_context``."""
        return new_fact(request, self.config.separator)

    def _found(self, base: Method, requests: Sequence[EditRequest]) -> list[tuple[Solution, dict[str, Any]]]:
        """What a base method finds for every edit alone, and what it says about it."""
        with self.bench.sites.disabled():
            outcomes = [base.regularise(outcome) for outcome in base.compute_apart(requests)]
        found = [(self._solution(base, outcome), outcome.diagnostics[0]) for outcome in outcomes]
        if not self.config.in_context or isinstance(base, Prompt):
            return found
        texts = [self._fact(request.asked("plain")) for request in requests]
        return [(replace(s, fact=text), numbers) for (s, numbers), text in zip(found, texts, strict=True)]

    def _solution(self, base: Method, outcome: Outcome) -> Solution:
        """What a base method has found for one edit.

        Raises:
            UnsupportedModelError: if it changes something else than a linear layer's matrix.
            ConfigError: if a change is no product of two thin matrices.
        """
        name = base.capabilities.name
        if isinstance(base, Prompt):
            (entry,) = outcome.entries
            return Solution(name, {}, entry.fact)
        factors: dict[str, Factors] = {}
        for delta in outcome.deltas:
            try:
                fits = delta.name == "weight" and sizes_of(self.bench.model, delta.module) == delta.shape[::-1]
            except (WeightError, AttributeError):
                fits = False
            if not fits:
                raise UnsupportedModelError(f"auto switches linear layers; {name} changes {delta.key}, which is none")
            if delta.left is None or delta.right is None:
                raise ConfigError(
                    f"{name} changes all of {delta.key}; auto needs a change of low rank (no rect_keep, no fine-tuning"
                    " of whole matrices)"
                )
            if delta.module in factors:
                raise ConfigError(f"{name} changes {delta.key} twice; auto keeps one change")
            factors[delta.module] = Factors(delta.left, delta.right)
        if not factors:
            raise EditFailedError(f"{name} found no change")
        return Solution(name, factors)

    def _memory(self, by_shelf: Sequence[Sequence[Solution]]) -> RoutedChanges:
        """The memory in which the solutions of all edits fit, shelf by shelf, or a new one.

        Raises:
            ConfigError: if it was begun with other settings, or a solution does not fit into it.
        """
        config = self.config
        for own in by_shelf:
            if len({solution.kind for solution in own}) > 1:
                raise ConfigError(
                    f"auto keeps changes of the same layers for all facts, and {own[0].base} writes some of these to"
                    " other projections than the rest: take expert_policy='shared'"
                )
        largest = [max(own, key=lambda solution: solution.rank) for own in by_shelf]
        memory = next((m for m in self.bench.sites.memories.values() if isinstance(m, RoutedChanges)), None)
        assert config.encoder is not None and config.slack is not None
        if memory is None:
            model, marks = self.bench.model, ("", f"{UNNAMED}_")
            shelves = [Shelf.fitting(s, model, config.rank, mark) for s, mark in zip(largest, marks, strict=False)]
            memory = RoutedChanges(
                shelves, config.encoder, config.slack, word_vectors(model), self._compared(),
                self.bench.anatomy.layer(0).path,
            )  # fmt: skip
        elif ([shelf.kind for shelf in memory.shelves], memory.encoder, memory.slack, memory.compared) != (
            [solution.kind for solution in largest], config.encoder, config.slack, self._compared(),
        ):  # fmt: skip
            kept = " and ".join(shelf.in_words for shelf in memory.shelves)
            raise ConfigError(
                f"the edits of auto were begun with encoder={memory.encoder!r}, slack={memory.slack:g}, states"
                f" {memory.compared} and {kept}; go on with these, or roll them back first"
            )
        for solution, shelf in zip(largest, memory.shelves, strict=True):
            if solution.rank > shelf.rank:
                raise ConfigError(
                    f"a change of rank {solution.rank} does not fit into an auto memory of rank {shelf.rank}; begin"
                    f" with rank={solution.rank}"
                )
        return memory.with_tokenizer(self.bench.tokenizer)


def _wordings(request: EditRequest) -> list[str]:
    """All wordings of a request in which its subject is named, without a chat around them."""
    return [request.plain_prompt, *request.rephrase_prompts]
