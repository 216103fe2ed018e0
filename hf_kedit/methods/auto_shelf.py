"""What the base methods of `auto` have computed, edit by edit; its memory (auto_memory.py) has a shelf for each.

Imported by the method's files; registers nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..books.book import Saved
from ..books.site_book import check_finite
from ..books.sites import SiteCall
from ..engine.lowrank import Factors
from ..engine.nearest import Vectors
from ..engine.weights import get_module, weight_shape
from ..errors import ArtifactError


@dataclass(frozen=True)
class Solution:
    """What a base method has computed for one edit: changes of layers, a text for the front of prompts, or both.

    Args:
        base: name of the method.
        factors: its changes, by module; none where it is a text alone.
        fact: the text; empty where there is none.
    """

    base: str
    factors: Mapping[str, Factors]
    fact: str = ""

    @property
    def paths(self) -> list[str]:
        """Names of the layers that it changes."""
        return sorted(self.factors)

    @property
    def kind(self) -> tuple[tuple[str, ...], bool]:
        """As of the shelf that it lies on."""
        return tuple(self.paths), bool(self.fact)

    @property
    def rank(self) -> int:
        """The largest rank of its changes, 0 without any."""
        return max((f.left.shape[1] for f in self.factors.values()), default=0)


class Shelf:
    """The solutions of all edits, in order: changes of the same layers, texts, or both. Immutable.

    Args:
        paths: names of the layers; none: the solutions are texts alone.
        rank: of a change, at each layer.
        sizes: (d_in, d_out) of every layer.
        mark: what sets the names of its tensors apart from those of another shelf.
        holds_texts: whether the solutions have texts.
    """

    def __init__(
        self,
        paths: Sequence[str],
        rank: int,
        sizes: Mapping[str, tuple[int, int]],
        mark: str = "",
        *,
        holds_texts: bool,
    ):
        self.paths, self.rank, self.sizes, self.mark = tuple(paths), rank, dict(sizes), mark
        self.holds_texts = holds_texts
        self.bases: tuple[str, ...] = ()
        self.facts: tuple[str, ...] = ()
        self._lefts = {path: Vectors(rank * sizes[path][1]) for path in self.paths}
        self._rights = {path: Vectors(rank * sizes[path][0]) for path in self.paths}

    @classmethod
    def fitting(cls, solution: Solution, model: nn.Module, rank: int | None = None, mark: str = "") -> Shelf:
        """An empty shelf for solutions of this kind, of a rank (``None``: its own)."""
        sizes = {path: sizes_of(model, path) for path in solution.paths}
        return cls(
            solution.paths, (rank or solution.rank) if sizes else 0, sizes, mark, holds_texts=bool(solution.fact)
        )

    @property
    def kind(self) -> tuple[tuple[str, ...], bool]:
        """What all its solutions have in common: the layers that they change, and whether they have texts."""
        return self.paths, self.holds_texts

    @property
    def in_words(self) -> str:
        """What lies on it."""
        changes = f"changes of {', '.join(self.paths)}" if self.paths else ""
        return " with ".join(filter(None, [changes, "texts" if self.holds_texts else ""]))

    def _copy(self) -> Shelf:
        made = copy.copy(self)
        made._lefts, made._rights = dict(self._lefts), dict(self._rights)
        return made

    def with_solutions(self, added: Sequence[Solution]) -> Shelf:
        """The shelf with more of them behind those that it has; the vectors of all share one memory.

        Raises:
            NonFiniteError: if a change is not finite.
        """
        made = self._copy()
        made.bases += tuple(solution.base for solution in added)
        made.facts += tuple(solution.fact for solution in added)
        for path in self.paths:
            for solution in added:
                factors = solution.factors[path].padded(self.rank)
                check_finite("change", factors.left, factors.right)
                made._lefts[path] = made._lefts[path].with_row(factors.left.reshape(-1))
                made._rights[path] = made._rights[path].with_row(factors.right.reshape(-1))
        return made

    def select(self, places: Sequence[int]) -> Shelf:
        """A shelf with the solutions at some places."""
        made = self._copy()
        made.bases, made.facts = (tuple(kept[i] for i in places) for kept in (self.bases, self.facts))
        made._lefts = {path: vectors.select(places) for path, vectors in self._lefts.items()}
        made._rights = {path: vectors.select(places) for path, vectors in self._rights.items()}
        return made

    def changed(self, call: SiteCall, output: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """An output with the changes of some edits added to some rows, at every position; the others bit for bit.

        Args:
            call: of one of the layers.
            output: ``[rows, width, d_out]``.
            rows: whose they are.
            places: of the edits of these rows.
        """
        device, (d_in, d_out) = call.inputs.device, self.sizes[call.path]
        rows, places = rows.to(device), places.to(device)
        right = self._rights[call.path].on(device)[places].view(-1, d_in, self.rank)
        left = self._lefts[call.path].on(device)[places].view(-1, d_out, self.rank)
        change = torch.bmm(torch.bmm(call.inputs[rows].float(), right), left.transpose(1, 2))
        output = output.clone()
        output[rows] = (output[rows].float() + change).to(output.dtype)
        return output

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors of all edits at every layer."""
        lefts = {self._name(path, "left"): self._lefts[path].tensor for path in self.paths}
        return lefts | {self._name(path, "right"): self._rights[path].tensor for path in self.paths}

    def _name(self, path: str, what: str) -> str:
        return f"{path}.kedit_auto_{self.mark}{what}"

    def describe(self) -> dict[str, Any]:
        """What all edits have in common."""
        both = {"texts": True} if self.paths and self.holds_texts else {}
        return {"paths": list(self.paths), "rank": self.rank, **both}

    def describe_edit(self, place: int) -> dict[str, Any]:
        """What is not a tensor of one edit."""
        fact = {"fact": self.facts[place]} if self.holds_texts else {}
        return {"base": self.bases[place], **fact}

    @classmethod
    def read(
        cls, model: nn.Module, part: Mapping[str, Any], edits: Sequence[Any], saved: Saved, mark: str = ""
    ) -> Shelf:
        """Rebuild a shelf.

        Args:
            model: that it belongs to.
            part: what `describe` returned.
            edits: what `describe_edit` returned, of each.
            saved: the edit that is read.
            mark: as of the shelf.

        Raises:
            ArtifactError: if something is missing or does not fit.
        """
        paths, rank = list(map(str, part["paths"])), int(part["rank"])
        if rank < 1 and paths:
            raise ArtifactError(f"{saved.source}: edits of auto change layers by rank {rank}")
        texts = not paths or part.get("texts") is True
        made = cls(paths, rank, {path: sizes_of(model, path) for path in paths}, mark, holds_texts=texts)
        made.bases = tuple(str(edit.get("base", "")) for edit in edits)  # not there in files of earlier versions
        made.facts = tuple(edit["fact"] if texts else "" for edit in edits)
        if texts and not all(isinstance(fact, str) and fact for fact in made.facts):
            raise ArtifactError(f"{saved.source}: an edit of auto lacks its text")
        for path in paths:
            d_in, d_out = made.sizes[path]
            made._lefts[path] = Vectors.of(saved.tensor(made._name(path, "left"), (len(edits), rank * d_out)))
            made._rights[path] = Vectors.of(saved.tensor(made._name(path, "right"), (len(edits), rank * d_in)))
        return made


def sizes_of(model: nn.Module, path: str) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer."""
    d_out, d_in = weight_shape(get_module(model, path))
    return d_in, d_out
