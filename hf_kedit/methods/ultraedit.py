"""UltraEdit (Gu et al. 2025, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models",
arXiv 2505.14679).

Nothing is located and nothing is trained: one forward and one backward pass over a turn of edits. At every edited
matrix, each token that predicts an answer token gives its input ``k`` and the gradient ``g`` of the loss at the
matrix's output. Both are standardised with running statistics over all turns so far ("lifelong normalisation"), and

    v_i = −η ‖k̂_i‖² ĝ_i,   ΔWᵀ = (KᵀK + I)⁻¹ KᵀV

with the raw ``k`` in ``K``. Written as ``ΔW = Vᵀ ((KKᵀ + I)⁻¹ K)``, every column of the factors belongs to one token
and so to one request: single edits can be taken back. The statistics are state of the method; they are never reset
between turns and are saved with the edits. They are not reduced by a rollback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat

from ..books.ledger import WeightDelta
from ..config import BoundedConfig, ModelProfile, WeightConfig
from ..config.spaces import layer_windows, times
from ..engine.examples import Example, ExampleBatch
from ..engine.forward import device_of
from ..engine.gradients import signals
from ..engine.supervised import IGNORE, Scores, collate, score, to_device
from ..engine.weights import get_module, weight_shape
from ..errors import ConfigError, EditFailedError, UnsupportedModelError
from ..logging import progress
from ..requests import EditRequest
from .base import Capabilities, Method, Outcome, register_method
from .drift import general_examples

EPS = float(torch.finfo(torch.float32).eps)
MICRO_BATCH = 10
DOUBLINGS = 16
"""η is doubled so often at most."""
ROLES = ("down", "up", "gate")
_SPAN = re.compile(r"\{(\d+)(?:-(\d+))?\}")


@dataclass
class UltraEditConfig(BoundedConfig, WeightConfig):
    """Hyperparameters of UltraEdit; see also `BoundedConfig`.

    ``rows_per_step`` requests share one backward pass (10 as published). How many are solved for together, a *turn*,
    is the ``batch_size`` of `EditableModel.edit`; 100 in the paper.

    Args:
        lr: η.
        edit_modules: the matrices to edit. Each entry is a module name, or one of ``down``, ``up``, ``gate`` for
            the matrices of the MLP; ``{18-26}`` or ``{18}`` in it stands for layers: ``"down.{18-26}"``,
            ``"model.layers.{18-26}.mlp.up_proj"``. ``{}`` (or a bare ``down``) means the layers of ``layers``.
        token: which positions count: ``ans``, those that predict an answer token (as the authors'), or ``mask``,
            all of prompt and answer.
        first_texts: so many general texts give the running statistics their first vectors. As published there are
            none, and a vector that is the only one seen so far is standardised to zero: a single edit of one token
            changes nothing.
        stop_probability: η is doubled until each token of every target has this probability, as long as the drift
            stays within ``drift_bound``; ``None``: η is ``lr``.
    """

    edit_type: ClassVar[str] = "ultraedit"

    lr: PositiveFloat = 1e-6
    edit_modules: list[str] | None = None
    token: Literal["ans", "mask"] = "ans"
    first_texts: NonNegativeInt = 0

    def validate(self) -> None:
        """Check the form of the module names."""
        super().validate()
        if self.edit_modules is None:
            return
        for entry in self.edit_modules:
            if entry.count("{") > 1 or (_SPAN.sub("", entry).replace("{}", "").count("{")):
                raise ConfigError(f"UltraEditConfig.edit_modules: {entry!r} may hold one {{}}, {{5}} or {{5-9}}")
            span = _SPAN.search(entry)
            if span and span[2] is not None and int(span[2]) < int(span[1]):
                raise ConfigError(f"UltraEditConfig.edit_modules: the layers of {entry!r} run backwards")
        if self.layers is not None and not any(_follows_layers(e) for e in self.edit_modules):
            raise ConfigError("UltraEditConfig: no entry of edit_modules uses `layers`; write {} where they go")

    @classmethod
    def model_dependent_fields(cls) -> tuple[str, ...]:
        """Fields filled from an hparams file or the model's depth."""
        return ("edit_modules",)

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The projections out of the MLPs of the last third without the last layer, as published for GPT-J."""
        n = profile.num_layers
        last = max(n - 2, 0)
        third = range(min(round(0.65 * n), last), last + 1)
        layers = [i for i in third if i in profile.mlp_layers] or profile.with_mlp(third)
        return {"edit_modules": _down(layers)}

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Which layers, the first step, and how far general text may move."""
        width = max(round(0.25 * profile.num_layers), 2)
        windows = layer_windows(profile, range(width), traced)
        return {
            "edit_modules": [_down(window) for window in windows],
            "lr": times(self.lr, 10.0, 0.1, 100.0),
            "drift_bound": times(self.drift_bound, 4.0, 0.25),
            "stop_probability": [0.9, 0.6],
        }

    def cautious(self, profile: ModelProfile) -> dict[str, Any]:
        """A small first η, and a few general texts to compare with.

        ``‖k̂‖²`` is about ``d_in`` and ``‖ĝ‖`` about ``√d_out``: with ``η = d⁻³ᐟ²`` an edited token's output moves
        by a fraction of a unit per layer.
        """
        careful = {"lr": float(f"{0.05 * profile.hidden_size**-1.5:.1g}"), "first_texts": 16}
        return super().cautious(profile) | careful

    def complete(self, profile: ModelProfile, *, files: bool = True) -> UltraEditConfig:
        """Fill in the modules; layers without modules mean the projections out of their MLPs."""
        if self.layers is not None and self.edit_modules is None:
            follows = UltraEditConfig(**{**self.given, "edit_modules": ["down"]})
            return super(UltraEditConfig, follows).complete(profile, files=files)
        if self.layers is None and any(_follows_layers(e) for e in self.edit_modules or []):
            raise ConfigError(
                "UltraEditConfig: edit_modules has an entry without layers; set `layers`, or write {5-9}"
            )
        return super().complete(profile, files=files)


def _down(layers: Sequence[int]) -> list[str]:
    """Entries for the projections out of the MLPs of some layers."""
    if len(layers) == layers[-1] - layers[0] + 1:
        return [f"down.{{{layers[0]}-{layers[-1]}}}"]
    return [f"down.{{{i}}}" for i in layers]


def _follows_layers(entry: str) -> bool:
    return entry in ROLES or "{}" in entry


@dataclass
class RunningScale:
    """Mean and spread of vectors over everything seen so far.

    Args:
        count: number of vectors.
        mean: ``[d]`` fp32.
        spread: sum of squared deviations, ``[d]`` fp32, as the authors update it: each addition counts ``b·Var``
            with the unbiased variance, so it is somewhat larger than the exact sum.
    """

    count: float
    mean: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def empty(cls, size: int) -> RunningScale:
        """Nothing seen yet."""
        return cls(0.0, torch.zeros(size), torch.zeros(size))

    def add(self, rows: torch.Tensor) -> RunningScale:
        """Return the scales with ``rows`` ``[b, d]`` added; a single row has no variance of its own."""
        b = rows.shape[0]
        variance = rows.var(dim=0) if b > 1 else torch.zeros_like(rows[0])
        mean, spread = self.mean.to(rows.device), self.spread.to(rows.device)
        shift = rows.mean(dim=0) - mean
        count = self.count + b
        return RunningScale(
            count, mean + shift * (b / count), spread + variance * b + shift**2 * (self.count * b / count)
        )

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation, ``[d]``; zero before the second vector."""
        return (self.spread / max(self.count - 1, 1)).sqrt()

    def standardise(self, rows: torch.Tensor) -> torch.Tensor:
        """``(rows − mean) / std`` per component."""
        return (rows - self.mean.to(rows.device)) / (self.std.to(rows.device) + EPS)


@register_method
class UltraEdit(Method):
    """Closed-form updates from one backward pass."""

    pictures = True
    config_class = UltraEditConfig
    capabilities = Capabilities(
        name="UltraEdit",
        kind="weights",
        batch=True,
        sequential=True,
        needs_subject=False,
        paper="Gu et al. 2025, arXiv 2505.14679",
        summary="one backward pass and a ridge regression per turn, with statistics kept over a lifetime of edits",
    )
    config: UltraEditConfig
    _scales: dict[tuple[int, int], RunningScale]

    def __init__(self, bench: Any, config: UltraEditConfig):
        super().__init__(bench, config)
        self._scales = {}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The running statistics, by the shape (inputs × outputs) of the matrices that share them; on the CPU."""
        state = {}
        for (d_in, d_out), scales in sorted(self._scales.items()):
            prefix = f"normaliser.{d_in}x{d_out}"
            state[f"{prefix}.count"] = torch.tensor([scales.count], dtype=torch.float64)
            state[f"{prefix}.mean"] = scales.mean.detach().cpu().clone()
            state[f"{prefix}.spread"] = scales.spread.detach().cpu().clone()
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over statistics written by `state_dict`; an empty dict starts afresh.

        Raises:
            ConfigError: if the tensors are not such statistics.
        """
        loaded = {}
        try:
            for shape in dict.fromkeys(name.split(".")[1] for name in state):
                d_in, d_out = (int(n) for n in shape.split("x"))
                parts = {p: state[f"normaliser.{shape}.{p}"] for p in ("count", "mean", "spread")}
                if any(tuple(parts[p].shape) != (d_in + d_out,) for p in ("mean", "spread")):
                    raise ValueError(shape)
                if not all(bool(torch.isfinite(p).all()) for p in parts.values()):
                    raise ValueError(shape)
                if min(float(parts["count"]), float(parts["spread"].min())) < 0:
                    raise ValueError(shape)
                loaded[d_in, d_out] = RunningScale(
                    float(parts["count"]), parts["mean"].float().clone(), parts["spread"].float().clone()
                )
        except (IndexError, KeyError, ValueError) as error:
            raise ConfigError(f"these are not UltraEdit's running statistics: {sorted(state)}") from error
        self._scales = loaded

    # ------------------------------------------------------------------ modules

    def edited_modules(self) -> list[str]:
        """Names of the edited matrices, in the order of the config.

        Raises:
            LayerError: for a layer or module that does not exist.
            UnsupportedModelError: if a layer has no such matrix of its own.
        """
        paths: list[str] = []
        for entry in self.config.edit_modules or []:
            span = _SPAN.search(entry)
            if span is not None:
                layers = list(range(int(span[1]), int(span[2] or span[1]) + 1))
                template = _SPAN.sub("{}", entry)
            else:
                template, layers = entry, list(self.config.layers or []) if _follows_layers(entry) else [0]
            for layer in layers:
                role = template.split(".")[0]
                paths.append(self._of_role(role, layer) if role in ROLES else template.replace("{}", str(layer)))
        for path in paths:
            weight = getattr(get_module(self.bench.model, path), "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
                raise UnsupportedModelError(f"{path} has no matrix: UltraEdit edits linear layers")
        return list(dict.fromkeys(paths))

    def _of_role(self, role: str, layer: int) -> str:
        anatomy = self.bench.anatomy
        if role == "down":
            return anatomy.down(layer).path
        where = anatomy.layer(layer)
        if role == "gate":
            chosen = where.gate
        else:
            ups = [p for p in where.ups if p != where.gate]
            chosen = ups[0] if len(ups) == 1 else None
        if chosen is None:
            raise UnsupportedModelError(
                f"layer {layer} of {anatomy.model_class} has no {role} matrix of its own. Matrices of this layer:\n"
                + where.list_projections()
            )
        return chosen.path

    # ------------------------------------------------------------------ editing

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check weights, tokens and lengths."""
        super().check(requests)
        self.examples(requests)

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """One turn: collect keys and gradients in micro-batches, bring the statistics up to date, solve."""
        bench, config = self.bench, self.config
        modules = self.edited_modules()
        shapes = {m: _inputs_and_outputs(bench.model, m) for m in modules}
        examples = self.examples(requests)
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
        micro = config.rows_per_step or MICRO_BATCH
        chunks = [order[i : i + micro] for i in range(0, len(order), micro)]
        scales = dict(self._scales) or self._first_scales(modules, shapes)
        keys: dict[str, list[torch.Tensor]] = {m: [] for m in modules}
        gradients: dict[str, list[torch.Tensor]] = {m: [] for m in modules}
        owners: list[int] = []
        losses = [0.0] * len(examples)
        for number, chunk in enumerate(progress(chunks, "collecting gradients", show=bench.show_progress)):
            signals_of, values, rows = self._collect([examples[i] for i in chunk], modules)
            owners.extend(chunk[r] for r in rows)
            for i, value in zip(chunk, values, strict=True):
                losses[i] = value
            for module in modules:
                k, g = signals_of[module]
                keys[module].append(k)
                gradients[module].append(g)
                shape = shapes[module]
                before = scales.get(shape) or RunningScale.empty(sum(shape))
                scales[shape] = before.add(torch.cat([k, g], dim=1))
                bench.note(f"batch{number}/{module}/keys", k)
                bench.note(f"batch{number}/{module}/output_grads", g)
        deltas = []
        for module in modules:
            k, g = torch.cat(keys[module]), torch.cat(gradients[module])
            z = scales[shapes[module]].standardise(torch.cat([k, g], dim=1))
            k_hat, g_hat = z.split(shapes[module], dim=1)
            v = -config.lr * (k_hat**2).sum(dim=1, keepdim=True) * g_hat  # [tokens, d_out]
            delta = WeightDelta(module, left=v.T, right=ridge_inputs(k), owners=tuple(owners))
            if not delta.finite():
                raise EditFailedError(f"UltraEdit: the update of {module} is not finite; load the model in float32")
            if bench.trace is not None:
                bench.note(f"{module}/delta", delta.matrix().T)
            deltas.append(delta)
        deltas, after, drift = self._as_large_as_needed(deltas, examples)
        self._scales = scales
        tokens = [owners.count(i) for i in range(len(examples))]
        diagnostics = [
            {
                "loss": [round(losses[i], 6)],
                "target_probability_before": float(torch.tensor(-losses[i]).exp()),
                **({"target_probability_after": after[i]} if after else {}),
                **drift,
                "tokens": tokens[i],
                "tokens_seen": max(m.count for m in scales.values()),
            }
            for i in range(len(examples))
        ]
        return Outcome(deltas, diagnostics)

    def _first_scales(
        self, modules: Sequence[str], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[tuple[int, int], RunningScale]:
        """Statistics over a few general texts (``first_texts``); as published, none."""
        scales: dict[tuple[int, int], RunningScale] = {}
        if not self.config.first_texts:
            return scales
        bench, texts = self.bench, self.bench.statistics.corpus_texts(more=False)
        with bench.unedited():
            examples = general_examples(bench.model, bench.tokenizer, texts, self.config.first_texts)
            signals_of, _, _ = self._collect(examples, modules)
        for module in modules:
            before = scales.get(shapes[module]) or RunningScale.empty(sum(shapes[module]))
            scales[shapes[module]] = before.add(torch.cat(signals_of[module], dim=1))
        return scales

    def _as_large_as_needed(
        self, deltas: list[WeightDelta], examples: Sequence[Example]
    ) -> tuple[list[WeightDelta], list[float], dict[str, Any]]:
        """The update times 1, 2, 4 …: the smallest that makes every fact hold, or the largest within the bound.

        Returns:
            The deltas, the probabilities of the targets with them, and what is to be said of the drift.
        """
        config, bench = self.config, self.bench
        if config.stop_probability is None:
            return deltas, [], {}
        restraint, factor, after = self.restraint([]), 1.0, list[float]()
        batch = ExampleBatch.of(bench.model, examples, bench.fill)
        for number in range(DOUBLINGS):
            added = restraint.added
            with bench.ledger.provisional() as scope, torch.no_grad():
                for delta in deltas:
                    scope.add(_times(delta, 2.0**number))
                restraint.settle(lambda: bench.model)
                nll = batch.token_losses(bench.model)
            if not restraint.within and after:  # the one before was the largest
                restraint.added = added
                break
            factor, after = 2.0**number, (-batch.means(nll)).exp().tolist()
            if not restraint.within or bool(batch.held(nll, config.stop_probability).all()):
                break
        return [_times(delta, factor) for delta in deltas], after, self.drift_report(restraint, after)

    def _collect(
        self, examples: Sequence[Example], modules: Sequence[str]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[float], list[int]]:
        """Inputs and output gradients of the modules at the chosen tokens of one micro-batch.

        Returns:
            Module → ``([tokens, d_in], [tokens, d_out])`` fp32; the mean loss of each example; the example that
            each token belongs to. The gradient is that of the mean over all answer tokens of the micro-batch.
        """
        model, count = self.bench.model, len(examples)
        batch = to_device(collate(examples, self.bench.fill), device_of(model))
        chosen = batch["labels"] != IGNORE if self.config.token == "ans" else batch["attention_mask"].bool()
        scores: list[Scores] = []

        def loss() -> torch.Tensor:
            scores.append(score(model, batch))
            return scores[0].nll.mean()

        heard = signals(model, modules, count, loss)
        signals_of = {module: signal.at(chosen) for module, signal in heard.items()}
        return signals_of, scores[0].per_row().tolist(), chosen.nonzero()[:, 0].tolist()


def _times(delta: WeightDelta, factor: float) -> WeightDelta:
    """A multiple of a change."""
    assert delta.left is not None
    return replace(delta, left=delta.left * factor)


def _inputs_and_outputs(model: torch.nn.Module, module: str) -> tuple[int, int]:
    d_out, d_in = weight_shape(get_module(model, module))
    return d_in, d_out


def ridge_inputs(keys: torch.Tensor) -> torch.Tensor:
    """``(KᵀK + I)⁻¹ Kᵀ`` ``[d_in, n]`` for keys ``K`` ``[n, d_in]``, solved in float64 on the smaller side."""
    k = keys.double()
    n, d = k.shape
    if n <= d:
        inner = k @ k.T + torch.eye(n, dtype=k.dtype, device=k.device)
        return torch.linalg.solve(inner, k).T.float()
    inner = k.T @ k + torch.eye(d, dtype=k.dtype, device=k.device)
    return torch.linalg.solve(inner, k.T).float()
