"""LoRA (Hu et al. 2021, arXiv 2106.09685), QLoRA (Dettmers et al. 2023, arXiv 2305.14314) and AdaLoRA (Zhang et al.
2023, arXiv 2303.10512) as edits.

A low-rank change of some matrices is trained on the masked, teacher-forced loss of the requests, with PEFT's own
layers and configs, and handed to the ledger as its two factors:

    LoRA      ΔW = (α/r) B A
    QLoRA     the same beside a weight that is kept in 4 (or 8) bits: y = dequantise(W) k + (α/r) B A k
    AdaLoRA   ΔW = (α/r₀) P Λ Q,   loss + γ · mean(‖PᵀP − I‖ + ‖QQᵀ − I‖), ranks shared out by importance

The layers sit in the model for the duration of the training only. What stays is a `WeightDelta`, so that an edit can
be undone, saved and exported like any other. Every call (every batch of a call) trains an adapter of its own on top of
the edits that the model carries already.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from ..anatomy import Anatomy
from ..anatomy.sight import ModuleScope, last_projections, projections_of
from ..anatomy.switching import Switch, switched
from ..anatomy.types import LayerAnatomy
from ..books.ledger import WeightDelta
from ..config import ModelProfile, UnlearningConfig, WeightConfig, adam_step
from ..config.spaces import layer_windows, times
from ..engine.devices import seeded
from ..engine.examples import ExampleBatch, mean_of_open, target_probabilities
from ..engine.forward import device_of
from ..engine.unlikelihood import Unlikelihood
from ..engine.weights import get_module, is_quantised, is_transposed
from ..errors import ConfigError, EditFailedError, LayerError, UnsupportedModelError
from ..logging import progress_bar, tell_loss
from ..requests import EditRequest
from .base import BothFormats, Capabilities, Method, Outcome, check_scope, register_method
from .drift import Restraint

if TYPE_CHECKING:  # PEFT takes seconds to import: only when an adapter is trained
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

ChunkLoss = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Number of a chunk of requests, negative log-likelihoods of its target tokens ``[tokens]``, which of its requests
hold already ``[requests]`` → the loss, a scalar."""
ADAPTER = "edit"
ATTENTION, MLP = "attention", "mlp"
_QUERY_OR_VALUE = re.compile(r"(w?[qv]|query|value)(_(proj|lin|linear))?")


@dataclass
class LoRAConfig(UnlearningConfig, WeightConfig):
    """Hyperparameters of LoRA; see also `UnlearningConfig`.

    ``rows_per_step`` requests share a step (``None``: one at a time).

    Args:
        layers: layers that get an adapter; ``None``: all of them, as published.
        target_modules: the matrices, by the end of their names (``"q_proj"``, ``"attn.c_attn"``), or ``"attention"``:
            the query and value projections, or the matrices into the attention where these are fused; or ``"mlp"``:
            the projection out of the MLP. Always within the language model, unless ``module_scope`` says otherwise.
        module_scope: of a model that sees, the part that gets adapters: ``language``; ``connector`` (projector,
            merger, Q-Former) or ``vision``: the last matrices of that part, or those that ``target_modules`` names
            by their ends.
        rank: r.
        lora_alpha: α; the change is scaled by α/r.
        lora_dropout: dropout on the adapter's input while it is trained. Published 0.1; an edit has no data to
            overfit to, so 0 is the default.
        num_steps: passes over the requests.
        lr: Adam's learning rate.
        weight_decay: of Adam.
        stop_loss: training ends when the mean loss of a pass falls below; ``None``: never (as published).
    """

    edit_type: ClassVar[str] = "lora"

    target_modules: list[str] | None = None
    module_scope: ModuleScope = "language"
    rank: PositiveInt = 8
    lora_alpha: PositiveInt = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    num_steps: PositiveInt = 50
    lr: PositiveFloat = 5e-3
    weight_decay: NonNegativeFloat = 0.0
    stop_loss: PositiveFloat | None = None

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file."""
        return ("target_modules",)

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """Query and value projections of every layer, as in both papers."""
        return {"target_modules": [ATTENTION]}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which matrices, how fast, how many directions, and how far general text may move."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "target_modules": [[MLP], [ATTENTION]],
            "lr": times(self.lr, 3.0, 0.3, 10.0),
            "rank": [2, 16],
            "drift_bound": times(self.drift_bound, 4.0, 0.25),
        }

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """The MLPs where facts are read (as MEMIT's layers), small steps, and as many as it takes.

        Low-rank changes of the attention in all layers reach every prompt alike: within the same drift twice as many
        unrelated answers change (docs/real_models.md).
        """
        careful = super().cautious(profile) | {"lr": adam_step(profile), "num_steps": 100}
        if self.layers is None and self.target_modules is None:
            n = profile.num_layers
            first = round(0.13 * n)
            layers = range(first, min(max(round(0.33 * n), first + 2), n))
            careful |= {"layers": list(layers), "target_modules": [MLP]}
        return careful


@dataclass
class QLoRAConfig(LoRAConfig):
    """Hyperparameters of QLoRA: those of LoRA. How the base is quantised is said when it is loaded."""

    edit_type: ClassVar[str] = "qlora"


@dataclass
class AdaLoRAConfig(LoRAConfig):
    """Hyperparameters of AdaLoRA. ``rank`` is the mean rank per matrix at the end; training starts with half more.

    Args:
        orth_reg_weight: γ, weight of the term that keeps P and Q orthogonal.
        warmup: share of the steps before ranks are taken away.
        cooldown: share of the steps at the end with the final ranks.
        beta: decay of the running means of sensitivity and its uncertainty.
    """

    edit_type: ClassVar[str] = "adalora"

    orth_reg_weight: NonNegativeFloat = 0.5
    warmup: NonNegativeFloat = 0.1
    cooldown: NonNegativeFloat = 0.3
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.85

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """Larger steps: the singular values start at zero, and orthogonality takes its part of every step."""
        return super().cautious(profile) | {"lr": 4 * adam_step(profile)}

    def validate(self) -> None:
        """Check that ranks are shared out at all."""
        super().validate()
        if self.warmup + self.cooldown >= 1:
            raise ConfigError("AdaLoRAConfig.warmup and cooldown leave no steps in which ranks are shared out")


class _LowRankTraining(Method):
    """What LoRA and AdaLoRA share: where the adapters go, and the loop that trains them."""

    both_formats: ClassVar[BothFormats | None] = "as two"
    pictures = True
    config: LoRAConfig

    def edited_modules(self) -> list[str]:
        """Names of the matrices that get an adapter."""
        anatomy, scope = self.bench.anatomy, self.config.module_scope
        if scope != "language":
            return paths_of_part(self.bench.model, anatomy, scope, self.config.target_modules or [ATTENTION])
        layers = self.config.layers if self.config.layers is not None else range(anatomy.num_layers)
        return target_paths(anatomy, layers, self.config.target_modules or [ATTENTION])

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the model, its matrices, and that the requests fit."""
        if getattr(self.bench.model, "peft_config", None):
            raise UnsupportedModelError(
                f"the model carries a PEFT adapter; merge it (merge_and_unload) before editing with"
                f" {self.capabilities.name}, or edit with a method that changes the weights beneath it"
            )
        super().check(requests)
        check_scope(self.config.module_scope, requests)
        self.examples(requests)
        self.unlikelihood(requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train an adapter on a batch of requests and return its factors."""
        bench, config = self.bench, self.config
        examples, paths = self.examples(requests), self.edited_modules()
        size = config.rows_per_step or 1
        chunks = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
        began = time.perf_counter()
        before = target_probabilities(bench.model, examples, bench.fill, size)
        batches = [ExampleBatch.of(bench.model, [examples[i] for i in part], bench.fill) for part in chunks]
        objective = self.objective(requests, chunks, batches)
        unwanted = [self.unlikelihood([requests[i] for i in part]) for part in chunks]
        adapter = self.peft_config(paths, len(chunks) * config.num_steps)
        with seeded(config.seed, bench.model), injected(bench.model, adapter, paths) as tuner:
            losses, restraint = self._train(tuner, chunks, batches, objective, unwanted)
            tuner.eval()  # the fresh layers only (dropout): the model itself is in evaluation mode already
            after = target_probabilities(bench.model, examples, bench.fill, size)
            deltas = []
            for path in paths:
                left, right = self.factors(get_module(bench.model, path))
                if left.shape[1]:  # AdaLoRA may leave a matrix no rank at all
                    deltas.append(WeightDelta(path, left=left, right=right))
        if not deltas:
            raise EditFailedError("training left no matrix any rank; raise rank or lr")
        drift = self.drift_report(restraint, after)
        seconds = time.perf_counter() - began
        diagnostics = [
            {
                "loss": [round(x, 6) for x in losses[i]],
                "target_probability_before": before[i],
                "target_probability_after": after[i],
                "steps": len(losses[i]),
                "rank": sum(d.left.shape[1] for d in deltas if d.left is not None) / len(paths),
                "seconds_training": seconds,
                **drift,
            }
            for i in range(len(examples))
        ]
        return Outcome(deltas, diagnostics)

    @torch.enable_grad()
    def _train(
        self,
        tuner: BaseTuner,
        chunks: Sequence[Sequence[int]],
        batches: Sequence[ExampleBatch],
        objective: ChunkLoss,
        unwanted: Sequence[Unlikelihood],
    ) -> tuple[list[list[float]], Restraint]:
        """Adam over the adapter's parameters; returns the losses of each example, step by step, and what held it."""
        bench, config = self.bench, self.config
        trained = [p for p in tuner.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
        losses: list[list[float]] = [[] for chunk in chunks for _ in chunk]
        batch_losses: list[float] = []
        restraint = self.restraint(trained)
        with progress_bar(config.num_steps, "training the adapter", show=bench.show_progress) as bar:
            for _ in range(config.num_steps):
                done, lost = config.stop_probability is not None, True
                for number, (chunk, batch) in enumerate(zip(chunks, batches, strict=True)):
                    nll = batch.token_losses(bench.model)
                    held = batch.held(nll, config.stop_probability)
                    loss = objective(number, nll, held)
                    # all that the host waits for in a step, but for the drift
                    read = [batch.means(nll), loss.unsqueeze(0), held.all().unsqueeze(0).to(loss.dtype)]
                    *numbers, mean, all_held = torch.cat(read).tolist()
                    if not math.isfinite(mean):
                        raise EditFailedError("the loss became NaN or infinite while training; lower lr")
                    for i, value in zip(chunk, numbers, strict=True):
                        losses[i].append(value)
                    batch_losses.append(mean)
                    drift = restraint.penalty(bench.model)
                    unlikely, gone = unwanted[number].term(bench.model)
                    lost &= gone
                    if all_held and gone and restraint.allows(bench.model):
                        continue
                    done = False
                    optimiser.zero_grad()
                    (loss + drift + unlikely + self.penalty(tuner)).backward()
                    optimiser.step()
                    self.after_step(tuner, len(batch_losses))
                tell_loss(batch_losses[-1])
                bar.update(1)
                low = config.stop_loss is not None and sum(x[-1] for x in losses) / len(losses) < config.stop_loss
                if done or (low and lost and restraint.within):
                    break
        restraint.settle(lambda: bench.model)
        bench.note("batch_losses", torch.tensor(batch_losses))
        return losses, restraint

    # ------------------------------------------------------------------ what a method decides

    def objective(
        self, requests: Sequence[EditRequest], chunks: Sequence[Sequence[int]], batches: Sequence[ExampleBatch]
    ) -> ChunkLoss:
        """What is minimised: the mean over the target tokens of requests that do not hold yet.

        Called while the model is as it was before the edit, without an adapter.

        Args:
            requests: of the edit.
            chunks: the requests of each step, as indices.
            batches: their targets.
        """

        def likelihood(number: int, nll: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
            return mean_of_open(nll, held[batches[number].positions.rows.to(held.device)])

        return likelihood

    def peft_config(self, paths: Sequence[str], steps: int) -> PeftConfig:
        """PEFT's config of an adapter on these modules, trained for so many steps at most."""
        raise NotImplementedError

    def factors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """``left [d_out, r]`` and ``right [d_in, r]`` of a trained layer."""
        raise NotImplementedError

    def penalty(self, tuner: BaseTuner) -> torch.Tensor | float:
        """What is added to the loss."""
        return 0.0

    def after_step(self, tuner: BaseTuner, step: int) -> None:
        """Called after each step, counted from 1, while the gradients are still there."""

    def _common(self, paths: Sequence[str]) -> dict[str, Any]:
        config = self.config
        return {
            "target_modules": list(paths),
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "fan_in_fan_out": is_transposed(get_module(self.bench.model, paths[0])),
        }


@register_method
class LoRA(_LowRankTraining):
    """LoRA."""

    config_class = LoRAConfig
    capabilities = Capabilities(
        name="LoRA",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        undo="call",
        encoder_decoder=True,
        paper="Hu et al. 2021, arXiv 2106.09685",
        summary="trains low-rank changes of the query and value projections in all layers",
    )

    def peft_config(self, paths: Sequence[str], steps: int) -> PeftConfig:
        """Plain LoRA, ``A`` Kaiming-uniform and ``B`` zero."""
        from peft import LoraConfig as PeftLoraConfig

        return PeftLoraConfig(r=self.config.rank, **self._common(paths))

    def factors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """``(α/r) B`` and ``Aᵀ``."""
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        return b * layer.scaling[ADAPTER], a.T


@register_method
class QLoRA(LoRA):
    """LoRA that insists on a quantised base. LoRA itself takes one too."""

    config_class = QLoRAConfig
    capabilities = Capabilities(
        name="QLoRA",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        undo="call",
        encoder_decoder=True,
        paper="Dettmers et al. 2023, arXiv 2305.14314",
        summary="LoRA beside the quantised weights of a model loaded in 4 or 8 bits",
    )

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check as LoRA does, and that the matrices are quantised."""
        plain = [path for path in self.edited_modules() if not is_quantised(get_module(self.bench.model, path))]
        if plain:
            raise UnsupportedModelError(
                f"QLoRA edits a quantised base model, and {plain[0]} is not quantised. Load the model with"
                " quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',"
                " bnb_4bit_use_double_quant=True), or use the method 'lora'"
            )
        super().check(requests)


@register_method
class AdaLoRA(_LowRankTraining):
    """AdaLoRA."""

    config_class = AdaLoRAConfig
    capabilities = Capabilities(
        name="AdaLoRA",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        undo="call",
        encoder_decoder=True,
        paper="Zhang et al. 2023, arXiv 2303.10512",
        summary="LoRA that spends its rank on the matrices where it matters",
    )
    config: AdaLoRAConfig

    def peft_config(self, paths: Sequence[str], steps: int) -> PeftConfig:
        """The budget falls from 1.5 ``rank`` to ``rank`` per matrix between warm-up and cool-down."""
        from peft import AdaLoraConfig as PeftAdaLoraConfig

        config = self.config
        return PeftAdaLoraConfig(
            init_r=max(config.rank + 1, round(1.5 * config.rank)),
            target_r=config.rank,
            total_step=steps,
            tinit=int(config.warmup * steps),
            tfinal=int(config.cooldown * steps),
            beta1=config.beta,
            beta2=config.beta,
            orth_reg_weight=config.orth_reg_weight,
            **self._common(paths),
        )

    def penalty(self, tuner: BaseTuner) -> torch.Tensor:
        """γ times the mean over all P and Q of ``‖PᵀP − I‖`` and ``‖QQᵀ − I‖`` (eq. 4, without the square)."""
        terms = []
        for name, parameter in tuner.named_parameters():
            if not parameter.requires_grad or not ("lora_A" in name or "lora_B" in name):
                continue
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append((gram - torch.eye(len(gram), device=gram.device)).norm().to(device_of(self.bench.model)))
        return self.config.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, tuner: BaseTuner, step: int) -> None:
        """Bring the importance of every triple up to date and take away the least important ones."""
        tuner.update_and_allocate(step)

    def factors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """``(α/r₀) P Λ`` and ``Qᵀ``, without the triples that were taken away."""
        values = layer.lora_E[ADAPTER].flatten()
        kept = values.nonzero().flatten()
        scale = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5)
        return layer.lora_B[ADAPTER][:, kept] * values[kept] * scale, layer.lora_A[ADAPTER][kept].T


# ---------------------------------------------------------------------- where adapters go


def target_paths(anatomy: Anatomy, layers: Sequence[int], entries: Sequence[str]) -> list[str]:
    """Full names of the matrices that ``target_modules`` means, layer by layer.

    Raises:
        LayerError: if an entry matches no matrix of any of the layers.
    """
    targets: list[str] = []
    missing = set(entries)
    for where in (anatomy.layer(i) for i in layers):
        for entry in entries:
            if entry == MLP:
                paths = [where.down.path] if where.down is not None else []
            else:
                paths = _attention_inputs(where) if entry == ATTENTION else _ending(where, entry)
            targets.extend(paths)
            if paths:
                missing.discard(entry)
    if missing:
        raise LayerError(
            f"no layer of {anatomy.model_class} has a matrix {', '.join(sorted(missing))}. Matrices of layer"
            f" {layers[0]}:\n{anatomy.layer(layers[0]).list_projections()}"
        )
    return list(dict.fromkeys(targets))


def paths_of_part(model: nn.Module, anatomy: Anatomy, scope: ModuleScope, entries: Sequence[str]) -> list[str]:
    """Full names of the matrices that ``target_modules`` means in another part than the language model.

    Raises:
        LayerError: if nothing in the part has such a name.
        UnsupportedModelError: if the model has no such part.
    """
    if set(entries) <= {ATTENTION, MLP}:  # what is meant by default
        return last_projections(model, anatomy, scope)
    paths = projections_of(model, anatomy, scope)
    chosen = [p for p in paths if any(p == entry or p.endswith(f".{entry}") for entry in entries)]
    if not chosen:
        raise LayerError(
            f"the {scope} of {anatomy.model_class} has no matrix {', '.join(entries)}; it has:\n" + "\n".join(paths)
        )
    return chosen


def _ending(where: LayerAnatomy, name: str) -> list[str]:
    return [p.path for p in where.projections if p.path == name or p.path.endswith(f".{name}")]


def _attention_inputs(where: LayerAnatomy) -> list[str]:
    """Query and value projections of a layer, or every matrix into its attention where these are fused."""
    out = where.attention_out.path if where.attention_out else None
    into = [p for p in where.projections if p.path.startswith(f"{where.attention}.") and p.path != out]
    own = [p for p in into if _QUERY_OR_VALUE.fullmatch(p.name.lower())]
    return [p.path for p in (own or into)]


def injected(model: nn.Module, config: PeftConfig, paths: Sequence[str]) -> Switch[BaseTuner]:
    """PEFT's layers around some modules inside the block; the very same modules are back behind it."""
    from accelerate.utils import align_module_device
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype

    types: dict[Any, Any] = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    modules = {path: get_module(model, path) for path in paths}

    def inject() -> BaseTuner:
        with contextlib.ExitStack() as brought:  # PEFT puts an adapter where the weight is: offloaded ones are nowhere
            for module in modules.values():
                brought.enter_context(align_module_device(module))
            tuner: BaseTuner = types[config.peft_type](model, config, ADAPTER)
        cast_adapter_dtype(model, ADAPTER)  # trained in fp32, whatever the model's dtype
        for name, parameter in tuner.named_parameters():
            if tuner.prefix not in name:
                # AdaLoRA's count of ranks, which divides ΔW: where PEFT copies it to another device or dtype it comes
                # back trainable, so that an optimiser would move it on an accelerator and not on the CPU
                parameter.requires_grad_(False)
        return tuner

    def take_out() -> None:
        for path, module in modules.items():
            owner, _, name = path.rpartition(".")
            setattr(get_module(model, owner), name, module)
        model.__dict__.pop("peft_config", None)

    return switched(inject, take_out)
