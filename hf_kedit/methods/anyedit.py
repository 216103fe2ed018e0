"""AnyEdit (Jiang et al. 2025, arXiv 2502.05628): answers of any length, a chunk at a time.

One state cannot hold a long answer. So the answer is cut into chunks ``Y_1 … Y_n`` of a few tokens, and each has a
state of its own: that of the token before it, behind the layer ``l``. They are optimised one after another, each with
those before it in place:

    δ_k = argmin_δ −(1/|Y_k|) Σ_t log p(y_t | x, Y_<k, y_<t; h_1 + δ_1, …, h_{k-1} + δ_{k-1}, h_k + δ) + w ‖δ‖ / ‖h_k‖²

Then all of them are written together, by the update of another method: into matrices as MEMIT or AlphaEdit do, while
the keys of all other tokens of the text are held, or by training a layer as UnKE does.

µKE (Su et al. 2025, arXiv 2504.01196) lets a chunk's state help with everything that follows: δ_k is optimised for
``Y_k … Y_n``, of which chunk ``i`` counts ``(n − i + 1) / (n − k + 1)``, as if every ``Y_k … Y_i`` were a target of
its own (``objective="matryoshka"``). Its further coefficients, from the affinity of gradients, are not in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt

from ..books.ledger import WeightDelta
from ..config import EditConfig, ModelProfile, WeightConfig
from ..config.hparams import find_hparams
from ..config.spaces import times
from ..engine.capture import Tap, stream_states
from ..engine.examples import Example, target_probabilities
from ..engine.forward import device_of
from ..engine.rows import Row, check_lengths, prompt_end_rows
from ..errors import ConfigError
from ..requests import SLOT, EditRequest
from ..tokens import pad_rows
from ..values.optimise import Values, join_values, optimise_values, pick_values
from ..values.settings import ValueSettings
from .base import BothFormats, Capabilities, Method, Outcome, WrappingConfig, method_class, register_method
from .locate_then_edit import LocateConfig
from .spread import SpreadMethod
from .unke import Anchored, UnKE

BASES = ("memit", "alphaedit", "unke")
SMALL_WINDOW = 8
"""Tokens of a chunk without a packaged file: what one state of a small model holds after some forty evaluations."""
OF_CHUNKS = {"held_weight": 4.0}
"""What UnKE is told without a packaged file: beside general text that weighs thirty times as much, as it does for one
state, a layer learns a third of the way to the states of a dozen chunks (docs/methods/anyedit.md)."""


@dataclass
class AnyEditConfig(WrappingConfig, WeightConfig):
    """Hyperparameters of AnyEdit; how states are optimised and written is said in ``base``.

    Args:
        base: the method whose update writes the states: ``"memit"``, ``"alphaedit"`` or ``"unke"``, or its config.
        window_size: tokens of a chunk.
        objective: what a chunk's state is optimised for: the chunk (``"window"``), or everything from it on
            (``"matryoshka"``, as in µKE).
        hold_text: in an update of matrices, the other tokens of prompt and answer keep what they get from them.
    """

    edit_type: ClassVar[str] = "anyedit"

    base: Any = "unke"
    window_size: PositiveInt = 30
    objective: Literal["window", "matryoshka"] = "window"
    hold_text: bool = True

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Chunks that a state of a small model can hold."""
        return super().cautious(profile) | {"window_size": SMALL_WINDOW}

    def complete(self, profile: ModelProfile, *, files: bool = True) -> AnyEditConfig:
        """Fill in the base method's config as well, as many states at once need it."""
        own = copy(self)
        if self.base["edit_type"] == "unke" and not (files and find_hparams("unke", profile.name)):
            own.base = {**OF_CHUNKS, **self.base}
        return super(AnyEditConfig, own).complete(profile, files=files)

    def check_base(self, base: EditConfig) -> None:
        """One of those whose update takes a state per token."""
        if base.edit_type not in BASES:
            raise ConfigError(f"AnyEditConfig.base must be one of {', '.join(BASES)}, not {base.edit_type!r}")
        if not isinstance(base, LocateConfig):
            return
        if base.expert_policy != "shared" or base.sequence != "batches":
            raise ConfigError("AnyEditConfig.base: expert_policy must be 'shared' and sequence 'batches'")
        if base.norm_anchor is not None or base.boundary_layers:
            raise ConfigError("AnyEditConfig.base: norm_anchor and boundary_layers are for one value per fact")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """How long chunks are, and whose update writes them."""
        return {
            "window_size": [int(size) for size in times(self.window_size, 0.5, 0.25)],
            "base": [{"edit_type": name} for name in BASES if name != self.base["edit_type"]],
        }


@register_method
class AnyEdit(Method):
    """A base method's update, of one state for every chunk of an answer."""

    both_formats: ClassVar[BothFormats | None] = "as two"
    config_class = AnyEditConfig
    capabilities = Capabilities(
        name="AnyEdit",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        undo="call",
        paper="Jiang et al. 2025, arXiv 2502.05628",
        summary="for answers of any length: one state for every chunk, written as MEMIT, AlphaEdit or UnKE write one",
    )
    config: AnyEditConfig

    def __init__(self, bench: Any, config: AnyEditConfig):
        super().__init__(bench, config)
        base = config.base_config
        if isinstance(base, LocateConfig):
            base = replace(base, context_templates=[SLOT])
        made = method_class(base)(bench, base)
        assert isinstance(made, UnKE | SpreadMethod)
        self.base: UnKE | SpreadMethod = made

    # ------------------------------------------------------------------ what the base method answers

    def edited_modules(self) -> list[str]:
        """Names of the modules that the base method edits."""
        return self.base.edited_modules()

    def fetch(self) -> None:
        """What the base method reads."""
        self.base.fetch()

    def prepare(self) -> None:
        """Prepare the base method."""
        self.base.prepare()

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights and lengths."""
        if isinstance(self.base, UnKE):
            self.base.check(requests)
        else:
            super().check(requests)
            check_lengths(self.bench.model, self._rows(requests), requests)

    # ------------------------------------------------------------------ editing

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Optimise the states of all chunks, and write them."""
        whole = self._rows(requests)
        chunks = [self._chunks(row) for row in whole]
        values = self._values(chunks)
        examples = [Example(row.ids, row.positions, row.targets) for row in whole]
        if isinstance(self.base, UnKE):
            texts = [
                Anchored(row.ids, tuple(chunk.fact for chunk in own), torch.cat([v.value for v in found]))
                for row, own, found in zip(whole, chunks, values, strict=True)
            ]
            deltas, numbers = self.base.train(texts, examples)
        else:
            deltas, numbers = self._spread(self.base, requests, chunks, values, examples)
        for own, found, diagnostics in zip(chunks, values, numbers, strict=True):
            diagnostics |= {
                "chunks": len(own),
                "loss": [round(v.loss[0][-1][0], 6) for v in found],
                "value_probability": min(v.probability[0][1] for v in found),
                "updates": sum(v.updates[0] for v in found),
            }
        return Outcome(deltas, numbers)

    def _spread(
        self,
        base: SpreadMethod,
        requests: Sequence[EditRequest],
        chunks: Sequence[Sequence[Row]],
        values: Sequence[Sequence[Values]],
        examples: Sequence[Example],
    ) -> tuple[list[WeightDelta], list[dict[str, Any]]]:
        """Write the states into the matrices of the base method, as if every chunk were a fact of its own."""
        bench, size = self.bench, self.config.rows_per_step or 1
        before = target_probabilities(bench.model, examples, bench.fill, size)
        owners = [i for i, own in enumerate(chunks) for _ in own]
        rows = [[chunk] for own in chunks for chunk in own]
        joined = join_values([v for found in values for v in found])
        anatomies = [base.anatomy_for(requests[i]) for i in owners]
        held = self._other_keys([example.ids for example in examples], chunks) if self.config.hold_text else None
        written, of_chunks = base.write(joined, rows, [[SLOT]], anatomies, {}, held)
        deltas = [
            d if d.owners is None else replace(d, owners=tuple(owners[column] for column in d.owners)) for d in written
        ]
        with bench.ledger.provisional() as scope:
            for delta in deltas:
                scope.add(delta)
            after = target_probabilities(bench.model, examples, bench.fill, size)
        # Of all that was missing, not the mean of ratios: a chunk that holds already misses nothing.
        ways = joined.offset.norm(dim=-1).cpu()
        left = ways * torch.tensor([numbers["residual_ratio"] for numbers in of_chunks])
        whose = torch.tensor(owners)
        return deltas, [
            {
                "target_probability_before": before[i],
                "target_probability_after": after[i],
                "residual_ratio": float(left[whose == i].sum() / ways[whose == i].sum().clamp_min(1e-12)),
            }
            for i in range(len(requests))
        ]

    def _other_keys(
        self, texts: Sequence[Sequence[int]], chunks: Sequence[Sequence[Row]]
    ) -> Callable[[str], torch.Tensor]:
        """What gives the inputs of a matrix at all tokens but those before a chunk, ``[d_in, tokens]``."""
        batch = pad_rows(texts, self.bench.fill).to(device_of(self.bench.model))
        others = batch.attention_mask.bool().cpu()
        for i, own in enumerate(chunks):
            others[i, [chunk.fact for chunk in own]] = False
        kept = others[batch.attention_mask.bool().cpu()]

        def keys(module: str) -> torch.Tensor:
            seen: list[torch.Tensor] = []
            stream_states(
                self.bench.model, batch, [Tap(module, "input")], lambda _, states: seen.append(states.float())
            )
            return seen[0][kept.to(seen[0].device)].T

        return keys

    # ------------------------------------------------------------------ rows and states

    def _rows(self, requests: Sequence[EditRequest]) -> list[Row]:
        return prompt_end_rows(self.bench.tokenizer, requests, self.base.config.separator)

    def _chunks(self, row: Row) -> list[Row]:
        """A row for every chunk of an answer, read and written at the token before the chunk."""
        size, count = self.config.window_size, len(row.targets)
        starts, first = range(0, count, size), row.fact
        chunks = []
        for k, start in enumerate(starts):
            end = min(start + size, count)
            weights: tuple[float, ...] = ()
            if self.config.objective == "matryoshka":
                weights = tuple((len(starts) - t // size) / (len(starts) - k) for t in range(start, count))
                end = count
            chunks.append(
                replace(
                    row,
                    ids=row.ids[: first + end],
                    fact=first + start,
                    positions=tuple(range(first + start, first + end)),
                    targets=row.targets[start:end],
                    prompt_length=first + start + 1,
                    weights=weights,
                )
            )
        return chunks

    def _values(self, chunks: Sequence[Sequence[Row]]) -> list[list[Values]]:
        """The states of every request's chunks, one chunk after another, that of all requests together."""
        bench, base = self.bench, self.base
        layer = base.layers[-1]
        found: list[list[Values]] = [[] for _ in chunks]
        for k in range(max(map(len, chunks))):
            open_ = [i for i, own in enumerate(chunks) if k < len(own)]
            rows = []
            for i in open_:
                shifts = tuple((chunk.fact, v.offset[0]) for chunk, v in zip(chunks[i], found[i], strict=False))
                rows.append([replace(chunks[i][k], shifts=shifts)])
            values = optimise_values(
                bench.model,
                bench.anatomy,
                rows,
                layer,
                "block",
                self._settings(),
                fill=bench.fill,
                batch_size=base.config.rows_per_step,
                description=f"chunk {k + 1}",
                show_progress=bench.show_progress,
            )
            for j, i in enumerate(open_):
                found[i].append(pick_values(values, j))
        return found

    def _settings(self) -> ValueSettings:
        """How the base method optimises a state, without the drift term on a subject."""
        base = self.base
        settings = base.config.value_settings() if isinstance(base, UnKE) else base.value_settings()
        return replace(settings, kl_factor=0.0)
