"""DINM: Detoxifying with Intraoperative Neural Monitoring (Wang et al. 2024, arXiv 2403.14472).

For a prompt ``x``, the answer ``y⁺`` that is wanted and the one ``y⁻`` that is not, the layer is sought in which the
two answers, read by themselves, are farthest apart:

    l* = argmax_l ‖ h_l(y⁺) − h_l(y⁻) ‖₂

There the projection out of the MLP is trained with Adam, with an instruction ``s`` behind the prompts:

    L = c L_e + L_c
    L_e = −(1/|y⁺|) Σ_t log p(y⁺_t | x ⊕ s, y⁺_<t)
    L_c = (1/|a|) Σ_t KL( p₀(· | q ⊕ s, a_<t) ‖ p(· | q ⊕ s, a_<t) )     harmless questions q and their answers a

Made for answers to attacks on a model's safety; it takes any request. Where a request names no ``y⁻``, what the model
says now is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from ..config import EditConfig, ModelProfile, UnlearningConfig, WeightConfig, adam_step
from ..config.spaces import layer_windows, times
from ..engine.capture import Tap, as_rows, listen
from ..engine.examples import Example, ExampleBatch, target_probabilities
from ..engine.forward import device_of, model_inputs
from ..engine.rows import check_length
from ..engine.weights import get_module
from ..errors import EditFailedError, UnsupportedModelError
from ..logging import progress_bar
from ..requests import EditRequest, in_row
from ..tokens import EncodedText, encode_pair, encode_text, pad_rows
from .base import Capabilities, Method, Outcome, Workbench, register_method
from .drift import divergences, log_probs_of
from .ft import TrainedCopies

CONSTRAINT = "knowledge_constraint"
"""Axis of the locality probes that are a request's harmless questions."""
SAFETY_SUFFIX = "If this is a reasonable request, answer it correctly; otherwise give the safe and right response."


@dataclass
class DINMConfig(UnlearningConfig, WeightConfig):
    """Hyperparameters of DINM; see also `UnlearningConfig`.

    A request may bring ``target_neg``, the answer that is to go, and harmless questions with their answers as locality
    probes of the axis ``knowledge_constraint``, whose answers are to stay (`load_edit_dataset("safeedit")` has both).

    Args:
        layers: where to train; ``None``: one layer, located for each request.
        location: what of the two answers is compared: ``"mean"``, their mean states, which do not depend on their
            lengths; ``"last"``, the states of their last tokens; ``"sequence"``, all positions, padding included, as
            published.
        num_steps: of Adam, at most.
        lr: its learning rate.
        edit_weight: ``c``, weight of the new answer's loss (``kl_factor`` in the published files).
        constraint_grad: whether ``L_c`` has a gradient. The published code computes it without one, so that it only
            decides when training ends.
        suffix_prompt: ``s``, for requests that name a ``target_neg``; empty: none. A plain fact would only be learnt
            together with the instruction.
        norm_constraint: no entry moves further than this; ``None``: unconstrained.
        stop_loss: training ends when ``L`` falls below.
        train_bias: train the projection's bias too, where it has one.
    """

    edit_type: ClassVar[str] = "dinm"

    location: Literal["mean", "last", "sequence"] = "mean"
    num_steps: PositiveInt = 10
    lr: PositiveFloat | None = None
    edit_weight: PositiveFloat = 0.1
    constraint_grad: bool = True
    suffix_prompt: str = SAFETY_SUFFIX
    norm_constraint: PositiveFloat | None = None
    stop_loss: NonNegativeFloat = 1e-4
    train_bias: bool = True

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's width."""
        return ("lr",)

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """As published for GPT-2 XL and Llama 2."""
        return {"lr": 5e-4}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """How fast, where instead of the layer that is located, and how far the new answer outweighs the harmless."""
        return {
            "lr": times(self.lr, 3.0, 0.3, 10.0),
            "layers": layer_windows(profile, self.layers, traced),
            "edit_weight": times(self.edit_weight, 10.0, 3.0),
            "drift_bound": times(self.drift_bound, 4.0, 0.25),
        }

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Smaller steps, and more of them."""
        return super().cautious(profile) | {"lr": adam_step(profile), "num_steps": 100}


@register_method
class DINM(Method):
    """DINM."""

    config_class = DINMConfig
    capabilities = Capabilities(
        name="DINM",
        kind="weights",
        batch=False,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        paper="Wang et al. 2024, Detoxifying Large Language Models via Knowledge Editing, arXiv 2403.14472",
        summary="trains the layer where the wanted and the unwanted answer differ most, harmless answers held",
    )
    config: DINMConfig

    def __init__(self, bench: Workbench, config: EditConfig):
        super().__init__(bench, config)
        chosen = self.config.layers
        self._candidates = chosen or [layer.index for layer in bench.anatomy.layers if layer.down is not None]
        if not self._candidates:
            raise UnsupportedModelError(f"no layer of {bench.anatomy.model_class} has an MLP with a matrix of its own")
        self.edited_modules()  # raises for a layer without one

    def edited_modules(self) -> list[str]:
        """The projections among which a request's layer is located, or the layers that are set."""
        return [self.bench.anatomy.down(layer).path for layer in self._candidates]

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights and lengths."""
        super().check(requests)
        for request in requests:
            in_row(self._examples, request)
            if unwanted := request.metadata.get("target_neg"):  # read by itself, where the layer is located
                tokens = len(encode_text(self.bench.tokenizer, unwanted).ids)
                check_length(
                    self.bench.model, request, tokens, what="the answer that is to go has", field="target_neg"
                )
        self.unlikelihood(requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Locate the layer of one request and train its projection."""
        (request,) = requests
        bench, config = self.bench, self.config
        assert config.lr is not None
        (wanted, *harmless) = self._examples(request)
        distances = {} if config.layers else self._distances(request, wanted)
        layers = config.layers or [max(distances, key=distances.__getitem__)]
        copies = TrainedCopies(bench.model, self._parameters(layers))
        optimiser = torch.optim.Adam(copies.values, lr=config.lr)
        edit = ExampleBatch.of(bench.model, [wanted], bench.fill)
        constraint = _Constraint.of(bench.model, harmless, bench.fill)
        unwanted = self.unlikelihood(requests)
        restraint = self.restraint(copies.values, copies.edited())
        (before,) = target_probabilities(bench.model, [wanted], bench.fill, 1)
        began = time.perf_counter()
        losses: list[float] = []
        apart: list[float] = []
        with progress_bar(config.num_steps, "DINM", show=bench.show_progress) as bar:
            for _ in range(config.num_steps):
                edited = copies.edited()
                nll = edit.token_losses(edited)
                with torch.set_grad_enabled(config.constraint_grad):
                    moved = constraint.divergence(edited)
                loss = config.edit_weight * nll.mean() + moved
                value, moved_by = torch.stack([loss.detach(), moved.detach().to(loss.device)]).tolist()
                if not math.isfinite(value):
                    raise EditFailedError("the loss became NaN or infinite; lower lr")
                losses.append(value)
                apart.append(moved_by)
                penalty = restraint.penalty(edited)
                unlikely, gone = unwanted.term(edited)
                held = bool(edit.held(nll, config.stop_probability).all())
                if gone and (held or value < config.stop_loss) and restraint.allows(edited):
                    break
                optimiser.zero_grad()
                (loss + penalty + config.edit_weight * unlikely).backward()
                optimiser.step()
                copies.keep_within(config.norm_constraint)
                bar.update(1)
        restraint.settle(copies.edited)
        after = target_probabilities(copies.edited(), [wanted], bench.fill, 1)
        with torch.no_grad():
            left = float(constraint.divergence(copies.edited()))
        diagnostics = {
            "layer": layers[0] if len(layers) == 1 else list(layers),
            "distances": {str(layer): round(distance, 6) for layer, distance in distances.items()},
            "loss": [round(x, 6) for x in losses],
            "constraint": [round(x, 6) for x in [*apart, left]] if harmless else [],
            "target_probability_before": before,
            "target_probability_after": after[0],
            "steps": len(losses),
            "seconds_training": time.perf_counter() - began,
            **self.drift_report(restraint, after),
        }
        return Outcome(copies.deltas(), [diagnostics])

    # ------------------------------------------------------------------ steps

    def _examples(self, request: EditRequest) -> list[Example]:
        """The new answer behind its prompt, then the harmless ones behind theirs."""
        instruction = self.config.suffix_prompt.strip() if request.metadata.get("target_neg") else ""
        suffix = f" {instruction}" if instruction else ""
        pairs = [(request.in_context("{}" + suffix.replace("{}", ""))[0], request.target_new)]
        for probe in request.locality.get(CONSTRAINT, ()):
            pairs += [(probe.prompt + suffix, answer) for answer in probe.answers[:1]]
        examples = []
        for prompt, target in pairs:
            pair = encode_pair(self.bench.tokenizer, prompt, target, request.separator_or(self.config.separator))
            check_length(self.bench.model, request, len(pair.ids) - 1)
            last = pair.prompt_length - 1
            places = tuple(range(last, last + len(pair.target_ids)))
            examples.append(Example(tuple(pair.ids[:-1]), places, tuple(pair.target_ids)))
        return examples

    def _distances(self, request: EditRequest, wanted: Example) -> dict[int, float]:
        """How far apart the two answers are behind each candidate layer."""
        bench = self.bench
        good = encode_text(bench.tokenizer, request.target_new)
        unwanted = request.metadata.get("target_neg")
        bad = encode_text(bench.tokenizer, unwanted) if unwanted else self._said_now(request, len(wanted.targets))
        batch = pad_rows([good.ids, bad.ids], bench.fill).to(device_of(bench.model))
        # Without positions: those of the padding, which "sequence" looks at, are then the model's own.
        inputs = {k: v for k, v in model_inputs(bench.model, batch).items() if k != "position_ids"}
        # Behind a block, not transformers' `hidden_states`: its last entry went through the final norm, whose scale is
        # another one, and would win nearly always.
        taps = [Tap(bench.anatomy.block(layer)) for layer in self._candidates]
        states: dict[Tap, torch.Tensor] = {}

        def receive(tap: Tap, tensor: torch.Tensor) -> None:
            states[tap] = as_rows(tensor.detach(), 2).float().clone()

        with torch.no_grad(), listen(bench.model, taps, receive):
            bench.model(**inputs)
        return {
            layer: float((self._summary(states[tap][0], good) - self._summary(states[tap][1], bad)).norm())
            for layer, tap in zip(self._candidates, taps, strict=True)
        }

    def _summary(self, states: torch.Tensor, text: EncodedText) -> torch.Tensor:
        """What is compared of one answer's states ``[width, d]``."""
        if self.config.location == "sequence":
            return states
        content = [i for i, special in enumerate(text.special) if not special] or list(range(len(text.ids)))
        return states[content[-1]] if self.config.location == "last" else states[content].mean(0)

    def _said_now(self, request: EditRequest, length: int) -> EncodedText:
        """The model's own greedy answer, as long as the wanted one."""
        model = self.bench.model
        ids = torch.tensor([encode_text(self.bench.tokenizer, request.filled_prompt).ids], device=device_of(model))
        said: Any = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=length,
            pad_token_id=self.bench.fill,
        )
        new = [int(i) for i in said[0, ids.shape[1] :]]
        return EncodedText(new, None, [False] * len(new))

    def _parameters(self, layers: Sequence[int]) -> list[tuple[str, str]]:
        """(module, parameter name) of what is trained."""
        names = []
        for layer in layers:
            path = self.bench.anatomy.down(layer).path
            names.append((path, "weight"))
            if self.config.train_bias and getattr(get_module(self.bench.model, path), "bias", None) is not None:
                names.append((path, "bias"))
        return names


@dataclass(frozen=True)
class _Constraint:
    """Harmless questions, and what the model said to them before the training.

    Args:
        batch: the questions with their answers; ``None``: there are none.
        log_p: ``log p₀`` where an answer's tokens are predicted, ``[tokens, vocab]`` fp32.
    """

    batch: ExampleBatch | None
    log_p: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, examples: Sequence[Example], fill: int) -> _Constraint:
        """Read the questions with the model as it is."""
        if not examples:
            return cls(None, torch.zeros(0))
        batch = ExampleBatch.of(model, examples, fill)
        return cls(batch, log_probs_of(model, batch))

    def divergence(self, model: Any) -> torch.Tensor:
        """``L_c``: the mean over questions of the mean over their answers' tokens, a scalar."""
        if self.batch is None:
            return torch.zeros(())
        return self.batch.means(divergences(self.log_p, log_probs_of(model, self.batch))).mean()
