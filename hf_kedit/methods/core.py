"""CORE: context-robust knowledge editing (Park et al. 2025, "Context Robust Knowledge Editing for Language Models",
arXiv 2505.23026).

MEMIT with one more term while values are optimised. An edit should hold whatever text stands before the prompt, so
the hidden states that the same fact has behind different contexts are pulled together in the layers above:

    loss + reg_lambda · mean over layers l of (1/d) Σ_{a<b} ‖h_a^l − h_b^l‖²

``a`` and ``b`` run over the context templates, ``l`` over the ``layer_range`` layers above the last edited one. The
contexts may be written around the fact itself, by letting the model go on from the subject, the old object or the
new one. Keys and the writing of the layers are MEMIT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt

from ..config import ModelProfile
from ..config.spaces import times
from ..engine.rows import Row
from ..engine.templates import cleaned, sample_texts
from ..errors import ConfigError, RequestError
from ..requests import EditRequest
from ..values.settings import ValueSettings
from .base import Capabilities, register_method
from .memit import MEMIT, MEMITConfig

ContextSource = Literal["subject", "target_true", "target_new"]
_SOURCES: dict[str, tuple[ContextSource, ...]] = {
    "all": ("subject", "target_true", "target_new"),
    "target_true": ("target_true",),
    "target_new": ("target_new",),
    "subject": ("subject",),
    "target_true_n_subject": ("subject", "target_true"),
}


@dataclass
class COREConfig(MEMITConfig):
    """Hyperparameters of CORE: those of MEMIT and of its consistency term.

    Args:
        reg_lambda: weight of the term; 0 gives MEMIT.
        layer_range: how many layers above the last edited one it compares (fewer where the model ends); ``None``: all.
        context: what contexts for the optimisation are generated from, per request; ``None``: the same templates as
            for the keys. A request without ``ground_truth`` does without those around the old object.
        context_count: generated contexts per source.
        context_length: tokens of such a context, its source included.
    """

    edit_type: ClassVar[str] = "core"
    keeps_keys_by_default: ClassVar[bool] = False

    reg_lambda: NonNegativeFloat = 0.04
    layer_range: PositiveInt | None = None
    context: Literal["all", "target_true", "target_new", "subject", "target_true_n_subject"] | None = None
    context_count: PositiveInt = 5
    context_length: PositiveInt = 10

    def validate(self) -> None:
        """Check that the optimiser knows the consistency term."""
        super().validate()
        if self.v_optimizer != "adam" and self.reg_lambda:
            raise ConfigError("COREConfig.v_optimizer: the consistency term (reg_lambda) is known to 'adam' alone")

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """MEMIT's, and the weight of the consistency term."""
        return super().search_space(profile, traced) | {"reg_lambda": times(self.reg_lambda, 0.1, 0.3, 3.0)}


@register_method
class CORE(MEMIT):
    """MEMIT with values that agree across contexts."""

    config_class = COREConfig
    capabilities = Capabilities(
        name="CORE",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=True,
        paper="Park et al. 2025, arXiv 2505.23026",
        summary="MEMIT with values that hold behind different contexts",
    )
    config: COREConfig

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Also: contexts around the old object alone need one."""
        super().check(requests)
        for request in requests if self.config.context == "target_true" else ():
            if not request.ground_truth:
                raise RequestError(
                    "context='target_true' writes contexts around the old object: give ground_truth",
                    row=request.row,
                    field="ground_truth",
                    request_id=request.id,
                )

    def value_settings(self) -> ValueSettings:
        """With the layers that the consistency term compares."""
        settings, config, depth = super().value_settings(), self.config, self.bench.anatomy.num_layers
        above = self.value_layer() + 1
        layers = tuple(range(above, depth if config.layer_range is None else min(above + config.layer_range, depth)))
        if not layers or not config.reg_lambda:
            return settings
        return replace(settings, together_factor=config.reg_lambda, together_layers=layers)

    def value_rows(self, requests: Sequence[EditRequest], rows: list[list[Row]]) -> list[list[Row]]:
        """Contexts around each fact, if asked for."""
        if self.config.context is None:
            return rows
        with self.bench.unedited():  # the unedited model writes them
            contexts = [self._contexts(request) for request in requests]
        built = []
        for owner, (request, templates) in enumerate(zip(requests, contexts, strict=True)):
            (group,) = self.rows([request], [["{}", *templates]])
            built.append([replace(row, owner=owner) for row in group])
        return built

    def _contexts(self, request: EditRequest) -> list[str]:
        """Templates that begin with the subject or an object, continued by the model as it is."""
        config, bench = self.config, self.bench
        assert config.context is not None
        known = {
            "subject": request.subject or "",
            "target_true": request.ground_truth[0].strip() if request.ground_truth else "",
            "target_new": request.target_new.strip(),
        }
        sources = [known[source] for source in _SOURCES[config.context] if known[source]]
        starters = [source for source in sources for _ in range(config.context_count)]
        generator = torch.Generator().manual_seed(config.seed)
        texts = sample_texts(bench.model, bench.tokenizer, starters, config.context_length, generator)
        return [cleaned(text) + ". {}" for text in texts]
