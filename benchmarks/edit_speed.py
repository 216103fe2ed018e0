"""How fast are edits? Our engine against the straightforward path, same model object, same requests, one run.

    python -m benchmarks.edit_speed --shape gpt2-small llama-16x1024 --method rome memit --edits 1 8 24 --json out.json
    python -m benchmarks.edit_speed --shape smollm2 --optimizer adam gauss_newton --reference 2

Every row carries the agreement of the two results (largest relative difference of an optimised value and of a weight
change): a ratio without agreement means nothing. It also says by how much memory grew at the peak of each side, and
how our time splits into stages (from one more run). Values that are further apart than 1e-4 are counted and computed
once more in float64 on both sides. On a CPU, one thread and process time are used; on a GPU, wall time around a
synchronised region. Second moments and context templates are given and not timed. AlphaEdit edits in three sequential
batches.

With ``--reference N`` the straightforward path edits the first N requests only, which says as much of its seconds per
edit as all of them; every side runs once. Vectors of another optimiser than the published one are not those of the
reference, and are judged by what they reach: evaluations, lowest loss, and what is then said (``--quality N``). Rows
of the same commit that the ``--json`` file holds are not measured again.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import reference
from benchmarks.quality import quality
from benchmarks.shapes import REAL, SHAPES, build, is_real, requests, texts, tokenizer_of
from benchmarks.timing import Sides, Stages, Table, alternate, begin, clock, difference, environment, parser
from hf_kedit import AlphaEditConfig, EditableModel, EMMETConfig, MEMITConfig, PMETConfig, ROMEConfig
from hf_kedit.books.ledger import Ledger
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.replay import Replay
from hf_kedit.engine.sweep import Sweep
from hf_kedit.engine.weights import get_module, get_weight
from hf_kedit.methods import locate_then_edit as locate
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus
from hf_kedit.statistics.solve import MomentFactor
from hf_kedit.values.optimise import optimise_values
from hf_kedit.values.settings import ValueSettings

WORDS = ("Some", "The", "An", "My", "Her")
TEMPLATES = {
    "rome": [["{}"], [f"{word} text before. {{}}" for word in WORDS for _ in range(4)]],
    "memit": [["{}"], [f"{word} longer text stands before it. {{}}" for word in WORDS]],
}
WEIGHT, RIDGE = 15000.0, 10.0
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rome": (ROMEConfig, {"v_weight_decay": 0.5}),
    "memit": (MEMITConfig, {"mom2_update_weight": WEIGHT}),
    "emmet": (EMMETConfig, {"mom2_update_weight": WEIGHT, "emmet_lambda": 0.1}),
    "pmet": (PMETConfig, {"mom2_update_weight": WEIGHT}),
    "alphaedit": (AlphaEditConfig, {"L2": RIDGE, "nullspace_fraction": 0.02}),
}
SEQUENCE = 3
SKIPPED = 300  # rows of a file that settings were chosen on
IDENTITY = ("shape", "method", "edits", "dtype", "reference")  # of a row in a file, beside its optimiser
APART = 1e-4  # values that differ by more are compared in float64 too


class Setting:
    """One model, one method, its requests, and both ways to edit.

    Args:
        shape: of the model.
        method: name of the method.
        edits: number of requests.
        device: where to run.
        dtype: of the weights.
        steps: of the value optimisation; ``None``: 20, or of the real model what the library derives.
        path: of the rows to edit; ``None``: facts of the world.
    """

    def __init__(
        self,
        shape: str,
        method: str,
        edits: int,
        device: str,
        dtype: torch.dtype,
        steps: int | None,
        path: str | None = None,
    ):
        self.base, self.method, self.device = build(shape, device, dtype), method, device
        self.tokenizer, self.losses = tokenizer_of(shape), list[torch.Tensor]()
        self.reference: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        chosen = SHAPES[shape][2]["rome" if method == "rome" else "memit"]
        self.layers: list[int] = chosen if isinstance(chosen, list) else [chosen]
        kind, values = CONFIGS[method]
        common = {"v_num_grad_steps": steps or 20, "v_lr": 0.5, "v_weight_decay": 1e-3, "clamp_norm_factor": 4.0}
        templates = TEMPLATES["rome" if method == "rome" else "memit"]
        chosen_values = {"v_num_grad_steps": steps} if shape == REAL else {**common, **values}
        config = kind(layers=self.layers, context_templates=templates, stats_ridge=0.0, **chosen_values)
        self.model = EditableModel(self.base, config, tokenizer=self.tokenizer)
        inner: Any = self.model._method
        self.inner = inner
        self.paths = [self.model.anatomy.down(layer).path for layer in self.layers]
        self._give_statistics()
        self.weight = getattr(self.inner.config, "mom2_update_weight", WEIGHT)
        todo = requests(edits, path, skip=SKIPPED if path else 0)
        parts = SEQUENCE if method == "alphaedit" and edits >= SEQUENCE else 1
        size = math.ceil(edits / parts)
        self.batches = [todo[i : i + size] for i in range(0, edits, size)]
        self.rows = [inner.rows(batch, inner.templates()) for batch in self.batches]

    def _give_statistics(self) -> None:
        """Second moments of few tokens; factorised or decomposed once, which is not part of an edit."""
        width = self.model.anatomy.down(self.layers[0]).in_features
        found = collect_moments(
            self.base,
            self.tokenizer,
            self.paths,
            text_corpus(texts(20 * width)),
            tokens=3 * width,
            show_progress=False,
        )
        store = self.model.statistics
        for path, moment in found.items():
            store.put(path, moment)
            if self.method != "alphaedit":
                store.factor(path)
        self.moments = [found[path].mean().to(next(self.base.parameters()).device) for path in self.paths]
        if self.method == "alphaedit":
            self.projectors = [self.inner.space(path).space.matrix().to(self.moments[0].device) for path in self.paths]

    def ours(self, values: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Weight changes of the library: per layer, or per request for ROME.

        Args:
            values: takes up the optimised value of every request (not in a run that is timed).
        """
        before = [get_weight(get_module(self.base, p)).float() for p in self.paths]
        changes: list[torch.Tensor] = []

        def measure() -> None:
            changes.extend(
                get_weight(get_module(self.base, p)).float() - b for p, b in zip(self.paths, before, strict=True)
            )

        for batch in self.batches:
            for part in [[request] for request in batch] if self.method == "rome" else [batch]:
                trace = self.model.trace = None if values is None else {}
                self.model.edit(part, show_progress=False)
                if values is not None and trace is not None:
                    self.losses.extend(trace[f"loss.{i}"][:, 0] for i in range(len(part)))
                    name = "v_star_mlp" if self.method == "pmet" else "v_star"
                    values.extend(trace[f"{name}.{i}"] for i in range(len(part)))
                if self.method == "rome":
                    measure()
                    self.model.rollback("all")
        if self.method != "rome":
            measure()
            self.model.rollback("all")
        return changes

    def stages(self) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, float]]:
        """From a run of its own: our values, weight changes, and the seconds of each stage."""
        places: dict[str, tuple[Any, str]] = {
            "first pass": (Replay, "__init__"),
            "steps": (locate, "optimise_values"),
            "keys and states": (Sweep, "read"),
            "solves": (MomentFactor, "solve") if self.method == "rome" else (type(self.inner), "columns"),
            "writing": (Ledger, "_commit"),
        }
        values: list[torch.Tensor] = []
        self.losses = []
        with Stages(places, self.device).watching() as seconds:
            changes = self.ours(values)
        self.model.trace = None
        return values, changes, seconds

    def first(self, count: int) -> list[Any]:
        """The rows of the first requests, in their batches."""
        found, left = [], count
        for batch in self.rows:
            found.append(batch[:left])
            left -= len(found[-1])
        return [batch for batch in found if batch]

    def in_float64(self, which: Sequence[int]) -> float:
        """Largest difference of the values of some requests (by number) with the weights and activations in float64.

        The first step of Adam moves every coordinate by the learning rate in the direction of its gradient's sign.
        Where a gradient is as small as rounding, two float32 computations part there, however exact both are.
        """
        settings = self.published()
        paths = self.paths if self.method == "rome" else self._plan().sites
        chosen: dict[str, Any] = {"rome": "down", "pmet": ("down", "attention_out")}
        sites = chosen.get(self.method, "block")
        rows, found = [group for batch in self.rows for group in batch], []
        self.base.double()
        try:
            with frozen_eval(self.base):
                for i in which:
                    ours = optimise_values(self.base, self.model.anatomy, [rows[i]], self.layers[-1], sites, settings)
                    initial, offset = reference.optimise(self.base, rows[i], paths, settings)
                    found.append(difference((ours.initials + ours.offsets)[0], initial + offset))
        finally:
            self.base.float()
        return max(found, default=0.0)

    def theirs(self, count: int | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """By the straightforward path: values of all requests, or of the first ``count``; the same weight changes."""
        settings, batches = self.published(), self.rows if count is None else self.first(count)
        with frozen_eval(self.base):
            if self.method == "rome":
                (rows,) = batches
                found = [reference.rome(self.base, g, self.paths[0], settings, self.moments[0]) for g in rows]
                return [value for value, _ in found], [change for _, change in found]
            return reference.spread(self.base, batches, settings, self._plan())

    def published(self) -> ValueSettings:
        """How values are optimised as published, whatever the optimiser of ours is."""
        settings: ValueSettings = replace(self.inner.config, v_optimizer="adam").value_settings()
        return settings

    def _plan(self) -> reference.Plan:
        anatomy, top, count = self.model.anatomy, self.layers[-1], len(self.layers)
        block, out = anatomy.layers[top].path, anatomy.layers[top].attention_out
        pmet = self.method == "pmet"
        assert out is not None
        columns: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {
            "memit": self._ridge,
            "pmet": self._ridge,
            "emmet": self._equal,
            "alphaedit": self._projected,
        }
        caches = self.caches = [torch.zeros_like(m, dtype=torch.float32) for m in self.moments]

        def remember(i: int, keys: torch.Tensor) -> None:
            caches[i] += (keys @ keys.T).float()

        return reference.Plan(
            self.paths,
            [self.paths[-1], out.path] if pmet else [block],
            self.paths[-1] if pmet else block,
            [len(group) for group in self.inner.templates()],
            columns[self.method],
            (lambda i: math.sqrt(count - i)) if pmet else (lambda i: count - i),
            remember if self.method == "alphaedit" else None,
        )

    def _ridge(self, i: int, k: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(self.weight * self.moments[i].double() + k @ k.T, k)

    def _equal(self, i: int, k: torch.Tensor) -> torch.Tensor:
        x = torch.linalg.solve(self.weight * self.moments[i].double(), k)
        ridge = 0.1 if k.shape[1] > 1 else 0.0
        return x @ torch.linalg.inv(k.T @ x + ridge * torch.eye(k.shape[1], dtype=k.dtype, device=k.device))

    def _projected(self, i: int, k: torch.Tensor) -> torch.Tensor:
        p, keys = self.projectors[i].float(), k.float()
        system = p @ (keys @ keys.T + self.caches[i]) + RIDGE * torch.eye(p.shape[0], device=p.device)
        return torch.linalg.solve(system, p @ keys).double()


def run(options: Any, shape: str, method: str, edits: int) -> list[dict[str, Any]]:
    """One configuration, with each optimiser: seconds, and how far the results are apart."""
    dtype = getattr(torch, options.dtype)
    setting = Setting(shape, method, edits, options.device, dtype, options.steps, options.rows)
    rows: list[dict[str, Any]] = []
    for optimiser in options.optimizer:
        setting.inner.config.v_optimizer = optimiser
        measure = in_alternation if options.reference is None else once
        found = measure(options, setting, edits, rows[0] if rows else None)
        counts = [len(losses) for losses in setting.losses]
        rows.append(
            {
                "shape": shape,
                "weights": "real" if is_real(shape) else "random",
                "method": method,
                "edits": edits,
                "optimizer": optimiser,
                "reference": options.reference,
                "steps": setting.inner.value_settings().steps,
                "evaluations": statistics.mean(counts),
                "loss": statistics.mean(float(losses.min()) for losses in setting.losses),
                **found,
                "steps_percent": 100 * (found["stages"]["first pass"] + found["stages"]["steps"]),
                **environment(options.device, options.dtype),
            }
        )
    return rows


def _shares(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: part / sum(seconds.values()) for stage, part in seconds.items()}


def _apart(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], name: str) -> dict[str, float]:
    found = [difference(x, y) for x, y in zip(a, b, strict=False)]
    return {f"{name}_difference": max(found), f"median_{name}_difference": statistics.median(found)}


def in_alternation(options: Any, setting: Setting, edits: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """Both sides with all requests, in alternation; compared are their values and weight changes."""
    sides = alternate(setting.ours, setting.theirs, pairs=options.pairs, device=options.device)
    (found, _, seconds), (targets, wanted) = setting.stages(), sides.results[1]
    values = [difference(a, b) for a, b in zip(found, targets, strict=True)]
    published = setting.inner.config.v_optimizer == "adam" and options.dtype == "float32"
    apart = [i for i, value in enumerate(values) if value > APART] if published else []
    return {
        **sides.figures(edits),
        **_apart(found, targets, "value"),
        "values_apart": len(apart),
        "values_apart_in_float64": setting.in_float64(apart),
        **_apart(sides.results[0], wanted, "largest"),
        "megabytes": sides.peaks[0] / 2**20,
        "megabytes_reference": sides.peaks[1] / 2**20,
        "stages": _shares(seconds),
    }


def once(options: Any, setting: Setting, edits: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """Every side once, the reference with a few requests, and not again for another optimiser of ours."""
    count, device = min(options.reference, edits), options.device
    if before is None:  # routes are checked and kernels chosen, with one request
        setting.model.edit(setting.batches[0][0], show_progress=False)
        setting.model.rollback("all")
    found, changes, seconds = setting.stages()
    sides = Sides(peaks=[0, 0])
    sides.seconds[0].append(sum(seconds.values()) / edits)
    if before is None:
        began = clock(device)
        setting.reference = setting.theirs(count)
        sides.seconds[1].append((clock(device) - began) / count)
    else:
        sides.seconds[1].append(before["seconds_reference"])
    targets, wanted = setting.reference
    comparable = setting.method == "rome" or count == edits  # else the weight changes are of other facts
    return {
        **sides.figures(),
        **_apart(found, targets, "value"),
        "values_apart": 0,
        "values_apart_in_float64": 0.0,
        **(_apart(changes, wanted, "largest") if comparable else {"largest_difference": math.nan}),
        "megabytes": 0.0,
        "megabytes_reference": 0.0,
        "stages": _shares(seconds),
    }


def main() -> None:
    """Run the configurations that the command line names and print a table."""
    options = parser(__doc__)
    options.add_argument("--shape", nargs="+", default=["gpt2-tiny", "llama-tiny"], choices=sorted(SHAPES))
    options.add_argument("--method", nargs="+", default=["rome", "memit"], choices=list(CONFIGS))
    options.add_argument("--edits", nargs="+", type=int, default=[1, 8])
    options.add_argument("--steps", type=int, help="evaluations per value (default 20; smollm2: as derived)")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--optimizer", nargs="+", default=["adam"], choices=["adam", "gauss_newton"])
    options.add_argument(
        "--reference", type=int, help="requests that the reference edits (default: all, in alternation)"
    )
    options.add_argument(
        "--rows", help="counterfact-edit.json; rows from 300 on are edited (default: facts of the world)"
    )
    options.add_argument("--quality", type=int, default=0, help="rows to judge each optimiser on, instead of timing")
    chosen = options.parse_args()
    begin(chosen)
    if chosen.quality:
        for shape in chosen.shape:
            for method in chosen.method:
                quality(chosen, shape, CONFIGS[method][0], SKIPPED)
        return
    table = Table(
        [
            ("shape", "shape", "12"),
            ("method", "method", "9"),
            ("edits", "edits", "5d"),
            ("optimizer", "optimizer", "12"),
            ("evaluations", "evaluations", "6.1f"),
            ("loss", "loss", "6.3f"),
            ("ours s/edit", "seconds", "11.3f"),
            ("reference", "seconds_reference", "9.3f"),
            ("ratio", "ratio", "6.2f"),
            ("value diff.", "value_difference", "11.1e"),
            ("weight diff.", "largest_difference", "12.1e"),
            ("apart", "values_apart", "5d"),
            ("in float64", "values_apart_in_float64", "10.1e"),
            ("MiB", "megabytes", "6.0f"),
            ("reference", "megabytes_reference", "9.0f"),
            ("% values", "steps_percent", "8.0f"),
        ],
        chosen.json,
    )
    known = table.measured(commit=environment(chosen.device)["commit"])
    for shape, method, edits in itertools.product(chosen.shape, chosen.method, chosen.edits):
        what = (shape, method, edits, chosen.dtype, chosen.reference)
        had = {r.get("optimizer"): r for r in known if tuple(r.get(name) for name in IDENTITY) == what}
        if set(chosen.optimizer) <= set(had):
            for optimiser in chosen.optimizer:
                table.show(had[optimiser])
        else:
            for row in run(chosen, shape, method, edits):
                table.add(row)


if __name__ == "__main__":
    main()
