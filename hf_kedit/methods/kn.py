"""KN: Knowledge Neurons (Dai et al. 2022, "Knowledge Neurons in Pretrained Transformers", arXiv 2104.08696).

The neurons of the MLPs that an answer rests on are found with integrated gradients (eq. 2-3, see
`hf_kedit.locate.attribution`): those whose attribution exceeds a fraction of the largest one and, with several
wordings of the fact, that are found for most of them. The old answer's embedding is then subtracted from the value
of each, and the new one's added (section 5.1 of the paper):

    W_i ← W_i − λ₁ ‖W_i‖ e_old/‖e_old‖ + λ₂ ‖W_i‖ e_new/‖e_new‖,   λ₁ = 1, λ₂ = 8

``W_i`` is column i of the projection out of the MLP, its norm that of the unedited model; a neuron is an input of that
projection. Where its activation is negative (common in gated MLPs, which the paper did not have), the change is
negated, so that it always acts in the direction of the new answer. The change of a layer is ``e sᵀ``, ``s`` zero off
the chosen neurons: rank one, so that it can be taken back and exported.

``mode="compat"`` follows the rules of EasyEdit's implementation instead, for comparisons with published numbers:
neurons before the activation, both ends of the path in the mean, greedy tokens for the old answer, and
unscaled embeddings in the proportion 2 : 1 (one target token) or 1 : 1 (several).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from ..books.ledger import WeightDelta
from ..config import ModelProfile, WeightConfig
from ..engine.capture import Tap
from ..engine.forward import Positions, device_of, gather_logits
from ..engine.rows import check_length
from ..engine.weights import get_module, get_weight, is_quantised
from ..errors import ConfigError, EditFailedError, RequestError, UnsupportedModelError
from ..locate.attribution import Attribution, Rule, attribute_neurons
from ..logging import get_logger, warn_once
from ..requests import EditRequest, in_row
from ..tokens import encode_pair, pad_rows
from .base import Capabilities, Method, Outcome, register_method

logger = get_logger(__name__)
FEW_STEPS = 20


@dataclass
class KNConfig(WeightConfig):
    """Hyperparameters of KN. Names are those of the published hparams files where they have one.

    ``layers`` limits the search; ``None`` searches every layer with an MLP of its own. ``rows_per_step`` is the number
    of integration points in one forward.

    Args:
        steps: points of the integral; with fewer than 20 the attributions are rough.
        integration: rule of the integral.
        adaptive_threshold: a neuron is kept if its attribution exceeds this fraction of the largest one.
        refine: search with the paraphrases of the request too, and keep the neurons that most of them share.
        p: with ``refine``, a neuron must be found for more than this fraction of the wordings.
        lambda_old: λ₁, how much of the old answer is taken away, in units of the value's norm.
        lambda_new: λ₂, how much of the new answer is added.
        embedding: whose rows stand for tokens: of the ``head`` (what a value is read with), or of the ``input``
            embeddings. The same in models that tie them.
        mode: ``paper``, or ``compat`` for EasyEdit's rules (then ``integration``, ``lambda_old``, ``lambda_new``
            and ``embedding`` do not count).
    """

    edit_type: ClassVar[str] = "kn"

    steps: PositiveInt = FEW_STEPS
    integration: Literal["midpoint", "trapezoid"] = "midpoint"
    adaptive_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    refine: bool = False
    p: Annotated[float, Field(ge=0, lt=1)] = 0.4
    lambda_old: NonNegativeFloat = 1.0
    lambda_new: NonNegativeFloat = 8.0
    embedding: Literal["head", "input"] = "head"
    mode: Literal["paper", "compat"] = "paper"

    def validate(self) -> None:
        """Check that the integral has enough points."""
        super().validate()
        if self.integration == "trapezoid" and self.steps < 2:
            raise ConfigError("KNConfig.steps must be at least 2 for the trapezoid rule")

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or by `derive`; the layers are all that there are."""
        return ("adaptive_threshold",)

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which neurons count, where they are looked for, and how much is put into them."""
        half, layers = profile.num_layers // 2, range(profile.num_layers)
        return {
            "layers": [profile.with_mlp(layers[half:]), profile.with_mlp(layers[:half])],
            "adaptive_threshold": [0.3, 0.1, 0.5],
            "lambda_new": [4.0, 2.0],
            "lambda_old": [0.5, 0.0],
            "refine": [True],
        }

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The paper's threshold."""
        return {"adaptive_threshold": 0.2}


@dataclass(frozen=True)
class _Wording:
    """One prompt of a fact as token ids, with its old and its new answer."""

    prompt: tuple[int, ...]
    old: tuple[int, ...]
    new: tuple[int, ...]


@register_method
class KN(Method):
    """Editing of the values of knowledge neurons."""

    config_class = KNConfig
    capabilities = Capabilities(
        name="KN",
        kind="weights",
        batch=False,
        sequential=True,
        needs_subject=False,
        told_wordings=True,
        paper="Dai et al. 2022, arXiv 2104.08696",
        summary="finds the MLP neurons behind an answer by attribution and rewrites their values",
    )
    config: KNConfig

    def searched_layers(self) -> list[int]:
        """The layers of the config, or all that have a projection out of an MLP of their own.

        Raises:
            UnsupportedModelError: if there is none, or with ``compat`` no separate matrix into the MLP.
        """
        anatomy = self.bench.anatomy
        layers = self.config.layers
        if layers is None:
            layers = [layer.index for layer in anatomy.layers if layer.down is not None]
        if not layers:
            anatomy.down(0)  # says what the model has instead
        return sorted(layers)

    def taps(self) -> list[Tap]:
        """Where the neurons are: inputs of the projections out of the MLPs (compat: outputs of those into them)."""
        taps = []
        for index in self.searched_layers():
            down, layer = self.bench.anatomy.down(index), self.bench.anatomy.layers[index]
            if self.config.mode == "paper":
                taps.append(Tap(down.path, "input"))
                continue
            source = layer.gate or (layer.ups[0] if layer.ups and not layer.fused else None)
            if source is None or source.out_features != down.in_features:
                raise UnsupportedModelError(
                    f"layer {index} of {self.bench.anatomy.model_class} has no separate matrix into its MLP, which"
                    " KN's compat mode reads the neurons from; use mode='paper'"
                )
            taps.append(Tap(source.path))
        return taps

    def edited_modules(self) -> list[str]:
        """Projections out of the MLPs of all searched layers."""
        return [self.bench.anatomy.down(layer).path for layer in self.searched_layers()]

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights, embeddings, tokens and lengths."""
        super().check(requests)
        self.taps()
        self._token_vectors([0])
        if self.config.steps < FEW_STEPS:
            warn_once(
                logger,
                f"KN: steps={self.config.steps} gives rough attributions; {FEW_STEPS} or more follow the integral",
            )
        for request in requests:
            if self.config.refine and not request.rephrase_prompts:
                raise RequestError(
                    "refine=True needs paraphrases of the prompt; give some, or set refine=False",
                    row=request.row,
                    field="rephrase_prompts",
                    request_id=request.id,
                )
            check_length(self.bench.model, request, in_row(self._longest, request))

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Find the neurons of one fact and rewrite their values."""
        (request,) = requests
        bench, config = self.bench, self.config
        assert config.adaptive_threshold is not None
        wordings = [self._wording(request, prompt) for prompt in self._prompts(request)]
        layers, taps = self.searched_layers(), self.taps()
        attributions = [self._attribute(taps, wording) for wording in wordings]
        votes = [
            torch.stack([masks[k] for masks in (a.above(config.adaptive_threshold) for a in attributions)]).sum(dim=0)
            for k in range(len(taps))
        ]
        needed = config.p * len(wordings) if config.refine else 0
        chosen = [v > needed for v in votes]
        count = sum(int(mask.sum()) for mask in chosen)
        if attributions[0].largest <= 0 or count == 0:
            raise EditFailedError(
                "KN found no neuron that raises the probability of the old answer"
                + ("; lower p or the threshold, or give other paraphrases" if config.refine else "")
            )
        main = wordings[0]
        vector = self._edit_vector(main)
        deltas = []
        for layer, mask, activation in zip(layers, chosen, attributions[0].activations, strict=True):
            if not bool(mask.any()):
                continue
            module = bench.anatomy.down(layer).path
            size = mask.float()
            if config.mode == "paper":
                # of the unedited values: those of edited ones would grow eightfold with every edit of a neuron
                norms = bench.ledger.original(module).float().norm(dim=0).to(mask.device)
                size = size * norms * activation.sign()
            left = vector.to(mask.device).unsqueeze(1)
            deltas.append(WeightDelta(module, left=left, right=size.unsqueeze(1), owners=(0,)))
        if bench.trace is not None:
            self._note_search(attributions[0], chosen, vector)
        before = self._probability(main)
        with bench.ledger.provisional() as scope:
            for delta in deltas:
                scope.add(delta)
            after = self._probability(main)
        diagnostics = {
            "neurons": count,
            "neurons_per_layer": {str(i): int(m.sum()) for i, m in zip(layers, chosen, strict=True) if bool(m.any())},
            "largest_attribution": attributions[0].largest,
            "wordings": len(wordings),
            "attributed_answer": bench.tokenizer.decode(list(main.old)),
            "target_probability_before": before,
            "target_probability_after": after,
        }
        return Outcome(deltas, [diagnostics])

    # ------------------------------------------------------------------ steps

    def _note_search(self, attribution: Attribution, chosen: Sequence[torch.Tensor], vector: torch.Tensor) -> None:
        """Leave what the search found in the trace."""
        note = self.bench.note
        if len({s.shape for s in attribution.scores}) == 1:
            note("scores", torch.stack([s.cpu() for s in attribution.scores]))
            note("activations", torch.stack([a.cpu() for a in attribution.activations]))
            note("neuron_mask", torch.stack([m.float().cpu() for m in chosen]))
        note("edit_vector", vector)

    def _prompts(self, request: EditRequest) -> list[str]:
        return [request.filled_prompt, *(request.rephrase_prompts if self.config.refine else [])]

    def _longest(self, request: EditRequest) -> int:
        """Tokens of the longest wording with either answer."""
        answers = [request.target_new, *request.ground_truth[:1]]
        encoded = [self._encode(request, prompt, answer) for prompt in self._prompts(request) for answer in answers]
        return max(len(prompt) + len(answer) for prompt, answer in encoded)

    def _encode(self, request: EditRequest, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        pair = encode_pair(self.bench.tokenizer, prompt, answer, request.separator_or(self.config.separator))
        return tuple(pair.prompt_ids), tuple(pair.target_ids)

    def _wording(self, request: EditRequest, prompt: str) -> _Wording:
        """Token ids of one wording; without a ground truth the old answer is what the model says now."""
        ids, new = self._encode(request, prompt, request.target_new)
        if request.ground_truth:
            return _Wording(ids, self._encode(request, prompt, request.ground_truth[0])[1], new)
        return _Wording(ids, tuple(self._greedy(ids, len(new))), new)

    def _attribute(self, taps: Sequence[Tap], wording: _Wording) -> Attribution:
        rule: Rule = "endpoints" if self.config.mode == "compat" else self.config.integration
        return attribute_neurons(
            self.bench.model,
            taps,
            wording.prompt,
            wording.old,
            steps=self.config.steps,
            rule=rule,
            batch_size=self.config.rows_per_step,
            fill=self.bench.fill,
            show_progress=self.bench.show_progress,
            anatomy=self.bench.anatomy,
            layers=self.searched_layers(),
        )

    def _edit_vector(self, wording: _Wording) -> torch.Tensor:
        """What is added to the value of a neuron (in paper mode: of norm 1), ``[H]`` fp32."""
        new = self._token_vectors(wording.new).sum(dim=0)
        if self.config.mode == "compat":
            greedy = self._token_vectors(self._greedy(wording.prompt, len(wording.new))).sum(dim=0)
            return new - (2.0 if len(wording.new) == 1 else 1.0) * greedy
        old = self._token_vectors(wording.old).sum(dim=0)
        return self.config.lambda_new * new / new.norm() - self.config.lambda_old * old / old.norm()

    def _token_vectors(self, ids: Sequence[int]) -> torch.Tensor:
        """Rows of the head or of the input embeddings, ``[tokens, H]`` fp32.

        Raises:
            UnsupportedModelError: if they are of another width than the MLPs' outputs.
        """
        anatomy = self.bench.anatomy
        use_head = self.config.mode == "paper" and self.config.embedding == "head" and anatomy.head is not None
        module = get_module(self.bench.model, anatomy.head if use_head and anatomy.head else anatomy.embeddings)
        weight = module.weight
        if weight.device.type == "meta" or is_quantised(module) or hasattr(weight, "full_tensor"):
            rows = get_weight(module)[list(ids)].float()
        else:
            rows = weight.detach()[list(ids)].float()
        if rows.shape[1] != anatomy.hidden_size:
            raise UnsupportedModelError(
                f"{anatomy.model_class} has embeddings of width {rows.shape[1]} and layers of width"
                f" {anatomy.hidden_size}: KN cannot write the one into the other"
            )
        return rows

    @torch.no_grad()
    def _logits(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Logits at some positions of one sequence, ``[positions, vocab]`` fp32."""
        model = self.bench.model
        batch = pad_rows([ids], self.bench.fill).to(device_of(model))
        return gather_logits(model, batch, Positions.of([positions], batch.input_ids)).float()

    def _greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The tokens that the model now says after a prompt."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self._logits(ids, [len(ids) - 1])[0].argmax()))
        return ids[len(prompt) :]

    def _probability(self, wording: _Wording) -> float:
        """Geometric mean per token of the probability of the new answer."""
        start = len(wording.prompt) - 1
        positions = range(start, start + len(wording.new))
        log_probs = self._logits([*wording.prompt, *wording.new[:-1]], positions).log_softmax(-1)
        picked = log_probs.gather(1, torch.tensor(wording.new, device=log_probs.device).unsqueeze(1))
        return float(picked.mean().exp())
