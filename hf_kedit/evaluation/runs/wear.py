"""What editing does to a model as a whole: weight drift, perplexity of fixed texts, general abilities.

Measured once before the first edit and at every checkpoint of a run. Says when a model is wearing down.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import EvaluationError
from ...logging import get_logger
from ...storage.files import json_ready
from ..asking.batching import stock_model
from ..measures import drift
from ..measures.abilities import Ability
from ..measures.distributions import activation_shift, perplexity
from .cache import PreEditCache

if TYPE_CHECKING:
    from ...model import EditableModel

logger = get_logger(__name__)


@dataclass
class WearMeter:
    """Measures a model before and along its edits.

    Args:
        model: carries the edits.
        texts: fixed texts for the perplexity; ``None``: it is not measured.
        abilities: tasks; each name once.
        token_budget: padded tokens per forward pass.

    Raises:
        EvaluationError: if two abilities have the same name.
    """

    model: EditableModel
    texts: Sequence[str] | None
    abilities: Sequence[Ability]
    token_budget: int
    perplexity_before: float | None = None
    has_warned: bool = False
    abilities_before: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [ability.name for ability in self.abilities]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise EvaluationError(f"two abilities are called {double!r}; give them different names")

    @property
    def is_asked(self) -> bool:
        """Whether there is anything to measure besides the weights."""
        return self.texts is not None or bool(self.abilities)

    def measure_before(self, cache: PreEditCache, state: tuple[Any, ...]) -> None:
        """Measure the model as it was handed in, unless it was measured before in this state.

        Args:
            cache: where the results are kept; another method on the same model finds them there.
            state: tells apart models, dtypes, devices and tokenizers.
        """
        if self.texts is not None:
            self.perplexity_before = cache.get_or_make((*state, "perplexity", *self.texts), self._perplexity)
        self.abilities_before = {
            ability.name: cache.get_or_make(
                (*state, "ability", ability.name, json.dumps(ability.settings(), sort_keys=True, default=str)),
                functools.partial(self._ability, ability),
            )
            for ability in self.abilities
        }

    def checkpoint(self, when: str, n_edits: int) -> dict[str, Any]:
        """Measure the model as it is now; warns when it is collapsing.

        Args:
            when: time in the report.
            n_edits: edits that the model carries by now.

        Returns:
            ``when``, ``n_edits``, ``drift`` (`drift.drift_summary`); with texts ``perplexity``,
            ``perplexity_before``, ``state`` and what `activation_shift` gives; with abilities ``abilities`` and
            ``abilities_before`` (name → ``score``, ``metric``, ``n`` …). JSON-ready.
        """
        point: dict[str, Any] = {
            "when": when,
            "n_edits": n_edits,
            "drift": drift.drift_summary(drift.weight_drift(self.model)),
        }
        relative = point["drift"].get("relative", 0.0)
        if not self.has_warned and not relative <= drift.DRIFT_WARNING:  # NaN, too
            self.has_warned = True  # once is enough: it only grows
            logger.warning(
                "after %d edits the change of a weight matrix is %.3g times as large as the matrix itself;"
                " collapse_text and abilities show what the model can still do",
                n_edits,
                relative,
            )
        if self.texts is not None:
            value = self._perplexity()
            state = drift.collapse_state(value, self.perplexity_before)
            point |= {"perplexity": value, "perplexity_before": self.perplexity_before, "state": state}
            point |= activation_shift(self.model, self.texts, token_budget=self.token_budget)
            if state != "ok":
                logger.warning(
                    "after %d edits the perplexity is %s (%.4g before): %s",
                    n_edits,
                    "not finite" if json_ready(value) is None else f"{value:.4g}",
                    self.perplexity_before or float("nan"),
                    "the model has collapsed" if state == "collapsed" else "the model is wearing down",
                )
        if self.abilities:
            point |= {"abilities": self._abilities(), "abilities_before": self.abilities_before}
        return json_ready(point)

    def _perplexity(self) -> float | None:
        if self.texts is None:
            return None
        base, tokenizer = stock_model(self.model), self.model.tokenizer
        assert tokenizer is not None
        return perplexity(base, tokenizer, self.texts, token_budget=self.token_budget).pooled

    def _abilities(self) -> dict[str, dict[str, Any]]:
        return {ability.name: self._ability(ability) for ability in self.abilities}

    def _ability(self, ability: Ability) -> dict[str, Any]:
        base, tokenizer = stock_model(self.model), self.model.tokenizer
        assert tokenizer is not None
        return ability.measure(base, tokenizer, self.token_budget)
