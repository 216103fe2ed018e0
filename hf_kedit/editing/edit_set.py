"""Edits as a set: which facts of a model count, and one solve of all of them (`methods.joint`)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..books.deltas import WeightDelta
from ..data.conflicts import normalised
from ..errors import ConfigError, EditFailedError, KeditError
from ..journal import EditConflict
from ..methods.base import Method, Outcome
from ..methods.first_values import content_key
from ..methods.joint import JointSolve
from ..methods.spread import SpreadMethod
from ..requests import EditRequest
from .formats import read_by

if TYPE_CHECKING:
    from ..books.ledger import Ledger


@dataclass
class FactSet:
    """The facts that count among those that a model carries.

    Args:
        facts: no two of them about the same.
        silent: contradicted or repeated by a later one; they come back when that one is taken back.
        conflicts: which facts contradict, repeat or affect one another.
    """

    facts: list[EditRequest]
    silent: list[EditRequest] = field(default_factory=list)
    conflicts: list[EditConflict] = field(default_factory=list)

    @classmethod
    def of(cls, requests: Sequence[EditRequest]) -> FactSet:
        """Find out which facts count: of two about the same, the later one.

        Two requests are about the same if the prompt of one is the prompt or a rephrasing of the other, in the same
        conversation: what holds as plain text need not hold in a chat.

        Args:
            requests: oldest first, each with an id.
        """
        chosen, by_prompt = cls([]), dict[str, EditRequest]()
        by_wording: dict[str, EditRequest] = {}
        for request in reversed(requests):
            prompt = _wording(request, request.filled_prompt)
            wordings = [prompt, *(_wording(request, text) for text in request.rephrase_prompts)]
            later = by_wording.get(prompt) or next((by_prompt[w] for w in wordings if w in by_prompt), None)
            if later is None:
                chosen.facts.append(request)
                by_prompt[prompt] = request
                by_wording = dict.fromkeys(wordings, request) | by_wording
            else:
                same = normalised(later.target_new) == normalised(request.target_new)
                chosen.silent.append(request)
                chosen._note("repetition" if same else "contradiction", later, request, request.target_new)
        for request in chosen.facts:
            for axis, probes in request.portability.items():
                for probe in probes:
                    other = by_prompt.get(_wording(request, probe.prompt))
                    if other is not None and normalised(other.target_new) not in map(normalised, probe.answers):
                        chosen._note(axis, request, other, other.target_new, probe.prompt, " / ".join(probe.answers))
        return chosen

    def _note(
        self,
        kind: str,
        one: EditRequest,
        other: EditRequest,
        target: str,
        prompt: str | None = None,
        wanted: str | None = None,
    ) -> None:
        ids = (str(one.id), str(other.id))
        targets = (one.target_new if wanted is None else wanted, target)
        self.conflicts.append(EditConflict(kind, ids, prompt or other.filled_prompt, targets))


def _wording(request: EditRequest, text: str) -> str:
    """A wording of a request, so that it equals another one's only in the same conversation."""
    chat = "" if request.prompt_format is None else f"{request.prompt_format} {(request.messages or [])[:-1]}"
    return chat + normalised(text)


@dataclass
class JointOutcome:
    """What a solve gives.

    Args:
        batch_id: a name made of the facts, so that the same set has the same one.
        requests: in the order of the columns of the deltas; the facts first, then those that are silent.
        outcome: deltas and numbers.
        failed: facts without a usable value, if they may be left out.
        seconds: of the solve.
    """

    batch_id: str
    requests: list[EditRequest]
    outcome: Outcome
    failed: list[tuple[EditRequest, KeditError]]
    seconds: float


def spread_method(method: Method) -> SpreadMethod:
    """The method, if it can solve for a set of facts.

    Raises:
        ConfigError: naming those that can.
    """
    if isinstance(method, SpreadMethod) and method.solves_together:
        if method.config.boundary_layers:
            raise ConfigError("boundary_layers gives each layer values of its own: no joint solve; switch it off")
        return method
    raise ConfigError(
        f"{method.capabilities.name} does not solve for all facts together; MEMIT, EMMET, PMET, AlphaEdit and their"
        " relatives do. Choose one with set_method(...)"
    )


def solve_set(
    method: SpreadMethod,
    ledger: Ledger,
    chosen: FactSet,
    passes: int,
    until: float,
    *,
    check: Callable[[], None],
    optional: Sequence[str] = (),
    after_pass: Callable[[int], None] | None = None,
) -> JointOutcome:
    """Solve for a set from the original weights; nothing has changed afterwards.

    Args:
        method: that solves.
        ledger: of the model.
        chosen: the facts.
        passes: at most so many.
        until: probability from which on a fact holds.
        check: called before anything is computed, once the method knows what it will write.
        optional: ids of facts that may be left out if no value is found for them.
        after_pass: called with the number of each pass while the model shows its result.

    Raises:
        EditFailedError: if no usable update was found.
    """
    started = time.perf_counter()
    ledger.check_unchanged()
    facts, failed = read_by(method, chosen.facts), list[tuple[EditRequest, KeditError]]()
    asked = {request.id: request for request in chosen.facts}
    with ledger.emptied():
        method.check(facts)
        check()
        method.prepare()
        spare = set(optional)
        for request in [r for r in facts if r.id in spare]:
            try:
                JointSolve(method, [request], passes, until).find_first_values()
            except EditFailedError as error:
                facts.remove(request)
                failed.append((asked[request.id], error))
        solve = JointSolve(method, facts, passes, until, after_pass=after_pass)
        outcome = solve.solve()
        if not all(delta.finite() for delta in outcome.deltas):
            raise EditFailedError("the computed update holds NaN or infinity; nothing was changed")
        outcome = method.regularise(outcome)
    method.first_values.keep([solve.name(request) for request in facts])
    requests = [*(asked[request.id] for request in solve.requests), *sorted(chosen.silent, key=content_key)]
    outcome.diagnostics += [{"joint": {"iterations": passes, "until": until, "silent": True}} for _ in chosen.silent]
    outcome.deltas = with_silent(outcome.deltas, range(len(solve.requests), len(requests)))
    name = hashlib.sha256("".join(map(content_key, requests)).encode()).hexdigest()
    return JointOutcome(f"joint-{name[:8]}", requests, outcome, failed, time.perf_counter() - started)


def with_silent(deltas: Sequence[WeightDelta], silent: Sequence[int]) -> list[WeightDelta]:
    """Give silent facts a column of zeros in the first delta: they belong to the set without changing anything."""
    if not silent or not deltas or deltas[0].left is None or deltas[0].owners is None:
        return list(deltas)
    first = deltas[0]

    def widened(columns: torch.Tensor | None) -> torch.Tensor | None:
        return None if columns is None else torch.cat([columns, columns.new_zeros(len(columns), len(silent))], dim=1)

    wider = replace(
        first,
        left=widened(first.left),
        right=widened(first.right),
        keys=widened(first.keys),
        owners=(*(first.owners or ()), *silent),
    )
    return [wider, *deltas[1:]]
