"""Fine-tuning of a few matrices: FT-L and FT-M.

Both train the projections out of the MLP of chosen layers with Adam until the loss falls below 0.01, optionally
inside an L∞ ball around the weights (Zhu et al. 2020, "Modifying Memories in Transformer Models",
arXiv 2012.00363; the baseline of ROME, arXiv 2202.05262). They differ in the loss of a request with target
tokens ``y_1 … y_n``:

    FT-L   −(1/n) Σ_t log p(y_t | prompt)              one distribution, at the last prompt token
    FT-M   −(1/n) Σ_t log p(y_t | prompt, y_<t)        teacher forced, prompt masked

For targets of several tokens FT-L's loss is not a likelihood; it is kept because it is the published baseline.
FT-M is the better choice. The weights are trained as fp32 copies outside the model, whatever its dtype.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch.func import functional_call

from ..config import ModelProfile
from ..engine.forward import accepts, device_of, logits_at, model_inputs
from ..engine.ledger import WeightDelta
from ..engine.weights import get_module, get_weight, is_transposed
from ..errors import EditFailedError, TargetTooLongError
from ..logging import progress_bar
from ..requests import EditRequest, in_row
from ..tokens import context_length, encode_pair, encode_target, pad_rows
from .base import Capabilities, Method, Outcome, WeightConfig, register_method

STOP_LOSS = 1e-2


@dataclass
class FTConfig(WeightConfig):
    """Hyperparameters of fine-tuning. ``batch_size`` requests share a step (``None``: one at a time).

    Args:
        num_steps: passes over the requests.
        lr: Adam's learning rate.
        weight_decay: of Adam.
        norm_constraint: no element of a weight moves further than this from where the call found it; ``None``:
            unconstrained.
        modules: module names with ``{}`` for the layer index, instead of the projection out of the MLP.
        train_bias: train the biases of these modules too (as published for GPT-2 and GPT-J).
        stop_loss: training ends when the mean loss of a pass falls below; smaller losses are not trained on.
    """

    num_steps: int = 25
    lr: float | None = None
    weight_decay: float = 0.0
    norm_constraint: float | None = None
    modules: list[str] | None = None
    train_bias: bool = False
    stop_loss: float = STOP_LOSS

    objective: ClassVar[Literal["prompt_last", "target_new"]]

    def validate(self) -> None:
        """Check ranges."""
        super().validate()
        self._require_positive("num_steps", "lr")
        self._require_positive("weight_decay", "stop_loss", zero=True)
        self._require_positive("norm_constraint", optional=True)

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return ("layers", "lr")

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Two thirds up the stack, as in most published configurations."""
        return {"layers": [min(round(0.66 * profile.num_layers), profile.num_layers - 1)], "lr": 5e-4}


@dataclass
class FTLConfig(FTConfig):
    """FT-L: all target tokens are scored at the last prompt token."""

    edit_type: ClassVar[str] = "ft-l"
    objective: ClassVar[Literal["prompt_last", "target_new"]] = "prompt_last"


@dataclass
class FTMConfig(FTConfig):
    """FT-M: masked, teacher-forced cross-entropy."""

    edit_type: ClassVar[str] = "ft-m"
    objective: ClassVar[Literal["prompt_last", "target_new"]] = "target_new"


@dataclass(frozen=True)
class _Example:
    """A request as token ids: what the model reads, where it is scored, what it should say."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    decoder_ids: tuple[int, ...] = ()


class FineTuning(Method):
    """The training loop that FT-L and FT-M share."""

    config: FTConfig

    def parameters(self) -> list[tuple[str, str]]:
        """(module, parameter name) of everything that is trained."""
        anatomy, config = self.bench.anatomy, self.config
        found = []
        for layer in config.layers or []:
            templates = config.modules or [anatomy.down(layer).path]
            for template in templates:
                path = template.replace("{}", str(layer))
                module = get_module(self.bench.model, path)
                found.append((path, "weight"))
                if config.train_bias and getattr(module, "bias", None) is not None:
                    found.append((path, "bias"))
        return list(dict.fromkeys(found))

    def edited_modules(self) -> list[str]:
        """Modules whose parameters are trained."""
        return list(dict.fromkeys(path for path, _ in self.parameters()))

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights and requests."""
        for path, name in self.parameters():
            self.bench.ledger.check_editable(path, name)
        self._examples(requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train on a batch of requests and return what changed."""
        bench, config = self.bench, self.config
        assert config.lr is not None
        examples = self._examples(requests)
        teacher_forced = self._examples(requests, "target_new")
        names = self.parameters()
        start = {f"{m}.{n}": get_weight(get_module(bench.model, m), n).float() for m, n in names}
        theta = {key: value.clone().requires_grad_(True) for key, value in start.items()}
        optimiser = torch.optim.Adam(list(theta.values()), lr=config.lr, weight_decay=config.weight_decay)
        size = config.batch_size or 1
        chunks = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
        losses: list[list[float]] = [[] for _ in examples]
        epoch_losses: list[float] = []
        backward_passes = 0
        began = time.perf_counter()
        before = self._probability(teacher_forced, {}, size)
        with progress_bar(config.num_steps, "fine-tuning", show=bench.show_progress and len(examples) > 1) as bar:
            for _ in range(config.num_steps):
                for chunk in chunks:
                    per_row = self._loss([examples[i] for i in chunk], theta)
                    loss = per_row.mean()
                    if not bool(torch.isfinite(loss)):
                        raise EditFailedError("the loss became NaN or infinite while fine-tuning; lower lr")
                    for i, value in zip(chunk, per_row.detach().tolist(), strict=True):
                        losses[i].append(value)
                    if float(loss.detach()) >= config.stop_loss:
                        optimiser.zero_grad()
                        loss.backward()
                        backward_passes += 1
                        self._note_gradients(theta, backward_passes)
                        optimiser.step()
                    self._project(theta, start)
                bar.update(1)
                epoch_losses.append(sum(row[-1] for row in losses) / len(losses))
                if epoch_losses[-1] < config.stop_loss:
                    break
        bench.note("epoch_losses", torch.tensor(epoch_losses))
        after = self._probability(teacher_forced, theta, size)
        seconds = time.perf_counter() - began
        deltas = [WeightDelta(m, n, dense=(theta[f"{m}.{n}"] - start[f"{m}.{n}"]).detach()) for m, n in names]
        diagnostics = [
            {
                "loss": [round(x, 6) for x in losses[i]],
                "target_probability_before": before[i],
                "target_probability_after": after[i],
                "steps": len(losses[i]),
                "seconds_training": seconds,
            }
            for i in range(len(examples))
        ]
        return Outcome(deltas, diagnostics)

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def _probability(self, examples: Sequence[_Example], theta: dict[str, torch.Tensor], size: int) -> list[float]:
        """Geometric mean per token of the target's probability, teacher forced."""
        found: list[float] = []
        for i in range(0, len(examples), size):
            found.extend((-self._loss(examples[i : i + size], theta)).exp().tolist())
        return found

    def _examples(self, requests: Sequence[EditRequest], objective: str | None = None) -> list[_Example]:
        limit = context_length(self.bench.model.config)
        examples = []
        for request in requests:
            example = in_row(lambda r: self._example(r, objective or self.config.objective), request)
            longest = max(len(example.ids), len(example.decoder_ids))
            if limit is not None and longest > limit:
                raise TargetTooLongError(
                    f"prompt and target have {longest} tokens, the model's context has {limit}",
                    row=request.row,
                    field="target_new",
                    request_id=request.id,
                )
            examples.append(example)
        return examples

    def _example(self, request: EditRequest, objective: str) -> _Example:
        tokenizer = self.bench.tokenizer
        if self.bench.anatomy.is_encoder_decoder:
            encoded = tokenizer(request.filled_prompt)["input_ids"]
            targets = encode_target(tokenizer, request.target_new, eos=True)
            begin = self.bench.model.config.decoder_start_token_id
            begin = tokenizer.pad_token_id if begin is None else begin
            shifted = (int(begin), *targets[:-1])  # the decoder sees the target shifted right by one
            if objective == "prompt_last":
                shifted = shifted[:1]
                return _Example(tuple(encoded), (0,) * len(targets), tuple(targets), shifted)
            return _Example(tuple(encoded), tuple(range(len(targets))), tuple(targets), shifted)
        pair = encode_pair(tokenizer, request.filled_prompt, request.target_new, self.config.separator)
        last = pair.prompt_length - 1
        if objective == "prompt_last":
            return _Example(tuple(pair.prompt_ids), (last,) * len(pair.target_ids), tuple(pair.target_ids))
        positions = tuple(range(last, last + len(pair.target_ids)))
        return _Example(tuple(pair.ids[:-1]), positions, tuple(pair.target_ids))

    def _loss(self, examples: Sequence[_Example], theta: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss per request under the trained copies, ``[requests]`` fp32."""
        model, fill = self.bench.model, self.bench.fill
        device = device_of(model)
        batch = pad_rows([e.ids for e in examples], fill).to(device)
        rows = torch.tensor([i for i, e in enumerate(examples) for _ in e.targets], device=device)
        columns = torch.tensor([p for e in examples for p in e.positions], device=device)
        targets = torch.tensor([t for e in examples for t in e.targets], device=device)
        counts = torch.tensor([len(e.targets) for e in examples], device=device)
        shape = tuple(batch.input_ids.shape)
        kwargs = model_inputs(model, batch)
        if examples[0].decoder_ids:
            decoder = pad_rows([e.decoder_ids for e in examples], fill).to(device)
            kwargs = {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "decoder_input_ids": decoder.input_ids,
                "decoder_attention_mask": decoder.attention_mask,
            }
            if accepts(model, "use_cache"):
                kwargs["use_cache"] = False
            shape = tuple(decoder.input_ids.shape)
        logits = logits_at(_Substituted(model, theta), kwargs, rows, columns, shape).float()  # type: ignore[arg-type]
        log_probs = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        total = torch.zeros(len(examples), device=device).index_add(0, rows, -log_probs)
        return total / counts

    def _project(self, theta: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> None:
        """Keep every element within ``norm_constraint`` of where the call found it."""
        bound = self.config.norm_constraint
        if bound is None:
            return
        with torch.no_grad():
            for key, value in theta.items():
                value.copy_(torch.maximum(torch.minimum(value, start[key] + bound), start[key] - bound))

    def _note_gradients(self, theta: dict[str, torch.Tensor], step: int) -> None:
        """Leave the first two gradients in the trace."""
        if self.bench.trace is not None and step <= 2:
            for key, value in theta.items():
                if value.grad is not None:
                    self.bench.note(f"grad_{'first' if step == 1 else 'second'}/{key}", value.grad)


class _Substituted:
    """The model with some parameters replaced by trained copies, for one call; the model itself is not touched."""

    def __init__(self, model: torch.nn.Module, theta: dict[str, torch.Tensor]):
        self.model = model
        self.replaced = {}
        for key, value in theta.items():
            path, _, name = key.rpartition(".")
            module = get_module(model, path)
            stored = getattr(module, name)
            turned = value.t() if value.dim() == 2 and is_transposed(module) else value
            self.replaced[key] = turned.to(device=stored.device, dtype=stored.dtype)

    def get_base_model(self) -> torch.nn.Module:
        """The model, for questions about its signature."""
        inner = getattr(self.model, "get_base_model", None)
        return cast(torch.nn.Module, inner() if callable(inner) else self.model)

    def __call__(self, **kwargs: Any) -> Any:
        return functional_call(self.model, self.replaced, kwargs=kwargs)


@register_method
class FTL(FineTuning):
    """FT-L."""

    config_class = FTLConfig
    capabilities = Capabilities(
        name="FT-L",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        encoder_decoder=True,
        paper="Zhu et al. 2020, arXiv 2012.00363; as in Meng et al. 2022, arXiv 2202.05262",
        summary="fine-tunes one MLP projection, all target tokens scored at the last prompt token",
    )


@register_method
class FTM(FineTuning):
    """FT-M."""

    config_class = FTMConfig
    capabilities = Capabilities(
        name="FT-M",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        encoder_decoder=True,
        paper="Zhang et al. 2024, arXiv 2401.01286",
        summary="fine-tunes one MLP projection with the usual masked, teacher-forced loss",
    )
