"""`calibrate`: settings of a method for a model that nobody has tuned it for, found on facts that the model knows.

    1  the model is asked which packaged facts it knows                                     (`facts`)
    2  causal tracing says in which layers it keeps them                                    (`locate.suggest_layers`)
    3  candidates: the derived settings, then settings that change some of their fields     (`candidates`)
    4  successive halving: all candidates on few facts, the best third on twice as many …   (`trials`, `scores`)
    5  the winner and the derived settings on facts that no candidate was tried on; the winner stays only if it wins

Derived settings are never dropped and win ties, so that the result is not worse than they are on the facts of the
search. Everything measured goes into a logbook at once; a search that was killed goes on to the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import AutoEditConfig, EditConfig
from ..config.hparams import find_hparams
from ..engine.forward import frozen_eval
from ..engine.weights import get_module, weight_shape
from ..errors import AnatomyError, ConfigError, TuneError, check_count
from ..locate import suggest_layers
from ..logging import get_logger
from ..methods.base import Capabilities, method_class
from ..requests import EditRequest, RequestSource
from ..statistics.store import FEW_TOKENS_PER_WIDTH
from ..storage.files import cache_home, json_ready, named_path
from ..tokens import needed_tokenizer
from ..version import __version__
from .candidates import Inventor, TuneCandidate, rungs
from .facts import ASKED_AT_ONCE, LEAST_FACTS, choose_facts
from .logbook import Logbook, digest_of
from .result import TriedSettings, TuneResult
from .scores import FactFigures, PairedGain, TuneScore
from .trials import OutOfTime, Stopwatch, Trials, quiet_trials

if TYPE_CHECKING:
    from ..model import EditableModel

logger = get_logger(__name__)
_CANDIDATES, _FIRST_FACTS, _SEARCH_FACTS, _HELD_OUT = 18, 4, 16, 16
_SEARCH_SHARE = 0.7
"""Part of the budget after which the search ends, so that there is time for the check."""
_CHECKED_AT_ONCE = 4
_TRACED_FACTS, _TRACE_SAMPLES = 6, 4
_PARENTS = 3
"""So many of the best candidates are crossed with each other."""
_SHARED_BYTES = 8e9
"""Second moments of all candidate layers are collected in one pass if they fit into so much memory."""


def calibrate(model: EditableModel, method: str | None = None, *, save: bool = True, **options: Any) -> EditConfig:
    """Find settings of a method for a model, and keep them where they are found by the model's name.

    Args:
        model: without edits. It is afterwards, bit for bit, what it was.
        method: name of the method; ``None``: the model's present one.
        save: write the settings with their measurements into the user's own folder
            (`hf_kedit.config.hparams.user_hparams`): ``EditableModel.from_pretrained(model, method)`` then takes them.
        options: see `search_settings`, which returns the measurements as well.

    Returns:
        The best settings found, or the derived ones where nothing was better on facts that the search never saw.

    Raises:
        TuneError: if the method has nothing to search, or the model knows too few facts.
    """
    found = search_settings(model, method, **options)
    place = found.write() if save and found.is_news else None
    logger.warning("%s%s", found.verdict, "" if place is None else f" Written to {place}")
    return found.config


def search_settings(
    model: EditableModel,
    method: str | None = None,
    *,
    facts: RequestSource | str | None = None,
    minutes: float | None = None,
    candidates: int = _CANDIDATES,
    first_facts: int = _FIRST_FACTS,
    search_facts: int = _SEARCH_FACTS,
    held_out: int = _HELD_OUT,
    packaged: bool = True,
    seed: int = 0,
    folder: str | Path | None = None,
    fresh: bool = False,
    show_progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Search for settings of a method, and check what was found.

    Args:
        model: without edits.
        method: name of the method; ``None``: the model's present one.
        facts: ``"facts"`` or ``"world"``, the packaged ones; ``None``: whichever of them the model knows; or requests
            of your own (with subject, ``ground_truth``, wordings, neighbours and conclusions), or a file of them.
        minutes: the search ends when so much time is over, and with it the check; ``None``: when it is done.
        candidates: settings that are tried.
        first_facts: so many facts every candidate edits.
        search_facts: so many facts the last few candidates edit.
        held_out: so many facts the winner is checked on.
        packaged: try the settings of a file that there is for the model, too.
        seed: of the facts, the candidates and the noise of causal tracing.
        folder: of the logbook; ``None``: one in the cache for this model and method.
        fresh: do not go on where an earlier search of the same kind ended, but begin anew.
        show_progress: show a bar.
        clock: seconds from some moment on; for tests.

    Raises:
        TuneError: if the method has nothing to search, the model carries edits, or it knows too few facts.
        UnsupportedModelError: if the method cannot edit the model.
    """
    for what, number in (("candidates", candidates), ("first_facts", first_facts), ("held_out", held_out)):
        check_count(what, number)
    check_count("search_facts", search_facts, first_facts)
    if minutes is not None and not minutes > 0:
        raise TuneError(f"minutes must be above 0, not {minutes!r}")
    name = model.method_name if method is None else method
    cls = method_class(name)
    _check_method(cls.capabilities)
    if model.edits:
        raise TuneError("settings are searched for on a model without edits; roll them back, or load it again")
    needed_tokenizer(model.tokenizer, "tuning")
    with model.exclusive():
        derived = cls.config_class().complete(model.profile, files=False)
        if not derived.search_space(model.profile, ()):
            raise TuneError(f"{cls.capabilities.name} has no settings that a search could find")
        before = model.edit_config
        watch = Stopwatch(minutes, clock, show_progress, f"tune {cls.capabilities.name}")
        try:
            place = (
                named_path(folder, "the folder", TuneError) if folder is not None else _default_folder(model, derived)
            )
            search = _Search(model, derived, Logbook(place, fresh=fresh), watch, seed)
            return search.run(facts, candidates, first_facts, search_facts, held_out, packaged)
        finally:
            watch.bar.close()
            model.set_method(before)


def _check_method(capabilities: Capabilities) -> None:
    if capabilities.needs_training:
        raise TuneError(
            f"{capabilities.name} edits with a network that is trained for the model: `kedit train` makes it, and its"
            " settings are those of the training"
        )


def _default_folder(model: EditableModel, derived: EditConfig) -> Path:
    """In the cache, by what decides the measurements and is not part of a trial: weights, number format, version."""
    key = digest_of(model.base_fingerprint(), str(model.base_model.dtype), __version__, torch.__version__)
    return cache_home() / "tune" / f"{derived.edit_type}-{key}"


class _Search:
    """One search.

    Args:
        model: without edits.
        derived: the settings that are derived for it.
        logbook: of earlier searches of the same kind.
        watch: bar and budget.
        seed: of everything random.
    """

    def __init__(self, model: EditableModel, derived: EditConfig, logbook: Logbook, watch: Stopwatch, seed: int):
        self.model, self.derived, self.logbook, self.watch, self.seed = model, derived, logbook, watch, seed
        self.trials = Trials(model, logbook, watch)
        self.figures: dict[str, list[FactFigures]] = {}

    def run(
        self,
        source: RequestSource | str | None,
        candidates: int,
        first_facts: int,
        search_facts: int,
        held_out: int,
        packaged: bool,
    ) -> TuneResult:
        """All steps; see the head of this file."""
        model, watch = self.model, self.watch
        planned = _edits(candidates, first_facts, search_facts)
        watch.plan(planned + 2 * held_out + (search_facts + held_out) / 4 + _TRACED_FACTS)
        watch.say("asking what the model knows")
        facts = choose_facts(
            model,
            source,
            search_facts,
            held_out,
            seed=self.seed,
            logbook=self.logbook,
            asked=lambda count: watch.done(count / ASKED_AT_ONCE),
        )
        traced = self._traced(facts.search)
        space = self.derived.search_space(model.profile, traced)
        inventor = Inventor(self.derived, space, model.profile, self.seed)
        watch.plan(_edits(candidates, first_facts, len(facts.search)) + 2 * len(facts.held_out))
        known = self._known() if packaged else None
        pool = inventor.start(known)
        pool += inventor.first(max(candidates - candidates // 3 - len(pool), 0))
        self._share_moments(pool)
        tried, size = self._halve(pool, inventor, candidates - len(pool), facts.search, first_facts)
        winner, by_number = tried[0], sorted(tried, key=lambda c: c.number)
        check = self._check(winner, facts.held_out)
        return TuneResult(
            best_config=winner.config,
            derived_config=self.derived,
            method=method_class(self.derived).capabilities.name,
            model=model.base_model_id or type(model.base_model).__name__,
            revision=model.base_model_revision,
            fingerprint=model.base_fingerprint(),
            facts=facts,
            derived=TriedSettings({}, self._score(by_number[0], size)),
            best=TriedSettings(winner.changes, self._score(winner, size)),
            **check,
            tried=[TriedSettings(c.changes, TuneScore.of(self.figures[c.key])) for c in by_number],
            traced=traced,
            seconds=watch.seconds,
            seed=self.seed,
            edits=self.trials.count,
            has_file=known is not None,
        )

    # ------------------------------------------------------------------ before the trials

    def _traced(self, facts: Sequence[EditRequest]) -> list[int]:
        """Layers that causal tracing names for the method; none where it names none, or layers are not searched."""
        model, layers = self.model, self.derived.layers
        space = self.derived.search_space(model.profile, ())
        by_range = layers is None and "edit_modules" in space
        if model.anatomy.is_encoder_decoder or not (by_range or (layers and "layers" in space)):
            return []
        wide = by_range or len(layers or ()) > 1
        asked = list(facts[:_TRACED_FACTS])
        key = digest_of("traced", wide, [(r.filled_prompt, r.ground_truth) for r in asked], _TRACE_SAMPLES, self.seed)
        if key not in self.logbook:
            self.watch.say("tracing where it keeps it")
            with quiet_trials():
                suggestion = suggest_layers(
                    model,
                    asked,
                    self.derived.edit_type,
                    default=[0, 1] if wide else [0],
                    samples=_TRACE_SAMPLES,
                    seed=self.seed + 1,
                    last_subject_only=True,
                    show_progress=False,
                )
            named = suggestion.layers if suggestion.source == "tracing" else []
            self.logbook.write(key, named, traced=suggestion.reason)
        return list(self.logbook[key])

    def _known(self) -> EditConfig | None:
        """The settings of a file that there is for the model."""
        profile = self.model.profile
        if find_hparams(self.derived.edit_type, profile.name) is None:
            return None
        return AutoEditConfig.for_method(self.derived.edit_type).complete(profile)

    def _share_moments(self, pool: Sequence[TuneCandidate]) -> None:
        """Collect the second moments of all layers that candidates edit in one pass over the text."""
        if "stats_tokens" not in self.derived.to_dict():
            return
        layers = sorted({layer for candidate in pool for layer in candidate.config.layers or ()})
        modules = [down.path for layer in layers if (down := self.model.anatomy.layers[layer].down) is not None]
        base = self.model.base_model
        needed = sum(8 * weight_shape(get_module(base, module))[1] ** 2 for module in modules)
        if needed > _SHARED_BYTES:
            logger.info("second moments of %d layers are not kept in memory together", len(layers))
            return
        self.watch.say(f"second moments of {len(modules)} layers, shared by all trials")
        per_width = getattr(method_class(self.derived), "tokens_per_width", FEW_TOKENS_PER_WIDTH)
        with quiet_trials(), frozen_eval(base):
            self.model.set_method(self.derived)
            self.model.statistics.moments(modules, per_width=per_width)

    # ------------------------------------------------------------------ the trials

    def _halve(
        self,
        pool: list[TuneCandidate],
        inventor: Inventor,
        crossed: int,
        facts: Sequence[EditRequest],
        first_facts: int,
    ) -> tuple[list[TuneCandidate], int]:
        """Successive halving; after the first rung's candidates come some that cross the best of them.

        Returns:
            All candidates that were tried, the best first, and on how many facts these were compared.

        Raises:
            TuneError: if there was not even time for the derived settings.
        """
        ranked, left, compared, over = list[TuneCandidate](), pool, 0, False
        for size, keep in rungs(len(pool) + crossed, first_facts, len(facts)):
            try:
                self._try(left, facts[:size])
                if not ranked:
                    new = inventor.crossed(self._ranked(left, size)[:_PARENTS], crossed)
                    left = left + new
                    self._try(new, facts[:size])
            except OutOfTime:
                if ranked:  # some of them on more facts, some not: the last complete rung counts
                    break
                over = True
            done = self._ranked(left, size)
            if pool[0] not in done:
                raise TuneError(
                    "there was not even time to try the derived settings; repeat the call with more minutes: what was"
                    " measured so far is kept"
                )
            ranked, compared = done + [c for c in ranked if c not in done], size
            left = [pool[0], *(c for c in done[:keep] if c.number)]
            if over or len(left) == 1:
                break
        return ranked, compared

    def _try(self, candidates: Sequence[TuneCandidate], facts: Sequence[EditRequest]) -> None:
        """Let candidates edit facts; those that the model cannot be edited with drop out."""
        for place, candidate in enumerate(candidates, start=1):
            self.watch.say(f"settings {place} of {len(candidates)} on {len(facts)} facts")
            try:
                about = json_ready(candidate.changes) or "derived"
                self.figures[candidate.key] = self.trials.measure(
                    candidate.config, facts, share=_SEARCH_SHARE, about=about
                )
            except (AnatomyError, ConfigError) as error:
                if not candidate.number:
                    raise
                logger.info("%s cannot be tried: %s", about, error)

    def _ranked(self, candidates: Sequence[TuneCandidate], size: int) -> list[TuneCandidate]:
        """Those that have edited so many facts, the best first: no harm, then the harmonic mean, then seniority."""
        done = [c for c in candidates if len(self.figures.get(c.key, ())) >= size]
        scores = {c.number: self._score(c, size) for c in done}
        return sorted(done, key=lambda c: (scores[c.number].harms(scores[0]), -scores[c.number].harmonic, c.number))

    def _score(self, candidate: TuneCandidate, size: int) -> TuneScore:
        return TuneScore.of(self.figures[candidate.key][:size])

    def _check(self, winner: TuneCandidate, facts: Sequence[EditRequest]) -> dict[str, Any]:
        """The derived settings and the winner on facts that no candidate was tried on; fields of a `TuneResult`."""
        derived, best = list[FactFigures](), list[FactFigures]()
        self.watch.plan((2 if winner.number else 1) * len(facts))
        self.watch.say(f"check on {len(facts)} facts that the search never saw")
        try:
            for start in range(0, len(facts), _CHECKED_AT_ONCE):
                part = facts[start : start + _CHECKED_AT_ONCE]
                now = self.trials.measure(self.derived, part, share=1.0, about="check: derived")
                if winner.number:
                    best += self.trials.measure(winner.config, part, share=1.0, about="check: best")
                derived += now  # only with its counterpart
        except OutOfTime:
            pass
        if len(derived) < min(LEAST_FACTS, len(facts)):
            return {"check_derived": None, "check_best": None, "gain": None}
        return {
            "check_derived": TuneScore.of(derived),
            "check_best": TuneScore.of(best) if winner.number else None,
            "gain": PairedGain.of(best, derived) if winner.number else None,
        }


def _edits(candidates: int, first_facts: int, all_facts: int) -> int:
    """About so many edits successive halving makes."""
    edits, before, left = 0, 0, candidates
    for size, keep in rungs(candidates, first_facts, all_facts):
        edits += left * (size - before)
        before, left = size, keep + 1
    return edits
