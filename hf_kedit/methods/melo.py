"""MELO (Yu et al. 2024, "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", arXiv 2312.11795).

Every call of ``edit`` trains a small LoRA block of its own on a few linear layers. Which block a prompt gets is
looked up in a database of clusters: the query is the *output* of a lower layer at the last token of the prompt,

    nearest centre within its radius  →  the block of the nearest point of that cluster, at every position
    otherwise                         →  no block, the model's own output bit for bit

An edit with query q, whose nearest centre is at distance d (R0 the initial radius):

    new      d > radius + R0   a cluster with centre q and radius R0
    join     same target       the point is added; the centre is the mean of the points, the radius reaches them all
    split    other target      a new cluster with radius d/2 + 1e-5; the old radius becomes d/2 − 1e-5, and points of
                               the old cluster outside it are forgotten
    overwrite  split at d ≈ 0  the cluster stands for the new edit alone (a split would disable both)

Block b contributes ``num_blocks · x A_b B_b``. The clusters follow from the edits' queries and targets alone, in
order; taking edits back builds them again without these edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from ..books.book import Saved
from ..books.site_book import SiteEntry, SiteMemory, check_finite, register_memory
from ..books.sites import Frame, SiteCall, SiteFunction, held_decision, needs_whole_prompt
from ..config import ModelProfile, StoppingConfig
from ..config.spaces import layer_windows, times
from ..engine.capture import Tap
from ..engine.examples import Example, ExampleBatch
from ..engine.nearest import SAME_PROMPT, distances
from ..engine.weights import compute_device, get_module, weight_shape
from ..errors import ArtifactError, ConfigError, EditFailedError
from ..logging import progress_bar
from ..requests import EditRequest
from .base import Capabilities, Outcome, register_method
from .site_method import SiteConfig, SiteMethod, before_and_after, check_loss, plain_name

NO_BLOCK = -1
GAP = 1e-5


@dataclass
class MELOConfig(StoppingConfig, SiteConfig):
    """Hyperparameters of MELO; see also `StoppingConfig`.

    ``layers`` and ``module`` name the layer whose output is the query.

    Args:
        target_modules: linear layers that get LoRA blocks; ``None``: the projections out of the next two MLPs. They
            must come after the query layer.
        num_blocks: at most so many blocks; every call of ``edit`` takes one. Also the factor of their contribution.
        rank: of a block.
        radius: R0.
        num_steps: Adam steps per block.
        lr: of Adam.
        lr_step: after so many steps the learning rate is halved.
        seed: of new blocks.
    """

    edit_type: ClassVar[str] = "melo"

    target_modules: list[str] | None = None
    num_blocks: PositiveInt = 350
    rank: PositiveInt = 2
    radius: PositiveFloat = 0.5
    num_steps: PositiveInt = 50
    lr: PositiveFloat = 1e-3
    lr_step: PositiveInt = 20
    seed: int = 0

    def search_space(self, profile: ModelProfile, traced: Sequence[int]) -> dict[str, list[Any]]:
        """Where keys are compared, how far a block reaches (whose scale is the model's), and how it is trained."""
        return {
            "layers": layer_windows(profile, self.layers, traced),
            "radius": [20.0, 5.0, 80.0],
            "lr": times(self.lr, 3.0, 0.3),
            "rank": [8],
        }

    def derive(self, profile: ModelProfile) -> dict[str, Any]:
        """The query two thirds up the stack, with room for the blocks above."""
        return {"layers": [min(round(0.66 * profile.num_layers), max(profile.num_layers - 3, 0))]}


# ---------------------------------------------------------------------- the database


@dataclass(frozen=True)
class BlockRecord:
    """One edit: what the clusters are built from.

    Args:
        edit_id: of the edit.
        batch_id: edits of one call are not compared with each other.
        block: its LoRA block.
        target: token ids.
    """

    edit_id: str
    batch_id: str
    block: int
    target: tuple[int, ...]


@dataclass(frozen=True)
class Cluster:
    """Points that stand for one target.

    Args:
        center: ``[d]``.
        radius: how far from the centre a prompt may be.
        target: token ids.
        points: ``[n, d]``.
        blocks: block of each point; ``NO_BLOCK`` for a centre that is left of forgotten points.
        edit_ids: edit of each point, ``""`` for such a centre.
    """

    center: torch.Tensor
    radius: float
    target: tuple[int, ...]
    points: torch.Tensor
    blocks: tuple[int, ...]
    edit_ids: tuple[str, ...]

    def joined(self, query: torch.Tensor, record: BlockRecord, least: float) -> Cluster:
        """The cluster with one more point."""
        points = torch.cat([self.points, query[None]])
        center = points.mean(dim=0)
        reach = float(distances(center[None], points).max())
        return Cluster(
            center,
            max(least, reach),
            self.target,
            points,
            (*self.blocks, record.block),
            (*self.edit_ids, record.edit_id),
        )

    def shrunk(self, radius: float) -> Cluster:
        """The cluster with a smaller radius and without the points outside it."""
        inside = (distances(self.center[None], self.points)[0] <= radius).tolist()
        if not any(inside):
            return replace(self, radius=radius, points=self.center[None].clone(), blocks=(NO_BLOCK,), edit_ids=("",))
        kept = [i for i, is_in in enumerate(inside) if is_in]
        return replace(
            self,
            radius=radius,
            points=self.points[kept],
            blocks=tuple(self.blocks[i] for i in kept),
            edit_ids=tuple(self.edit_ids[i] for i in kept),
        )


class ClusterStep(NamedTuple):
    """Where one edit went, and what that did to the clusters.

    Attributes:
        action: see the module's head.
        distance: of its query from the nearest centre before; ``None`` for the first edit.
        forgets: edits whose points were dropped.
    """

    action: Literal["new", "join", "split", "overwrite"]
    distance: float | None
    forgets: tuple[str, ...] = ()


def add_batch(
    clusters: Sequence[Cluster], queries: torch.Tensor, records: Sequence[BlockRecord], radius: float
) -> tuple[list[Cluster], list[ClusterStep]]:
    """Clusters with the edits of one call added; each is compared with the clusters from before the call.

    Args:
        clusters: before the call.
        queries: ``[rows, d]``.
        records: of the edits.
        radius: R0.
    """
    after, steps = list(clusters), []
    for query, record in zip(queries, records, strict=True):
        fresh = Cluster(query, radius, record.target, query[None], (record.block,), (record.edit_id,))
        if not clusters:
            after.append(fresh)
            steps.append(ClusterStep("new", None))
            continue
        gap, place = distances(query[None], torch.stack([c.center for c in clusters]))[0].min(dim=0)
        distance, nearest = float(gap), int(place)
        if distance > clusters[nearest].radius + radius:
            after.append(fresh)
            steps.append(ClusterStep("new", distance))
        elif clusters[nearest].target == record.target:
            after[nearest] = after[nearest].joined(query, record, radius)
            steps.append(ClusterStep("join", distance))
        elif distance <= SAME_PROMPT * float(query.norm()):
            steps.append(ClusterStep("overwrite", distance, tuple(i for i in after[nearest].edit_ids if i)))
            after[nearest] = replace(fresh, radius=after[nearest].radius)
        else:
            shrunk = after[nearest].shrunk(distance / 2 - GAP)
            forgets = tuple(i for i in after[nearest].edit_ids if i and i not in shrunk.edit_ids)
            after[nearest] = shrunk
            after.append(replace(fresh, radius=distance / 2 + GAP))
            steps.append(ClusterStep("split", distance, forgets))
    return after, steps


class Block(NamedTuple):
    """LoRA factors of one block at one layer: ``A [d_in, rank]``, ``B [rank, d_out]``."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class MELOChange:
    """A computed call of ``edit``.

    Args:
        block: number of the block.
        factors: the trained block at every target layer.
        queries: ``[rows, d]``.
        targets: token ids per row.
    """

    block: int
    factors: Mapping[str, Block]
    queries: torch.Tensor
    targets: tuple[tuple[int, ...], ...]


@register_memory
class BlockDatabase(SiteMemory):
    """MELO's clusters at one layer and its blocks at others.

    Args:
        paths: the query layer, then the target layers.
        radius: R0.
        num_blocks: largest number of blocks, and the factor of their contribution.
    """

    kind = "melo"

    def __init__(self, paths: Sequence[str], radius: float, num_blocks: int):
        super().__init__(paths)
        self.radius, self.num_blocks = radius, num_blocks
        self.records: tuple[BlockRecord, ...] = ()
        self.queries = torch.empty(0, 0)
        self.blocks: dict[int, Mapping[str, Block]] = {}
        self.clusters: list[Cluster] = []
        self._stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def edit_ids(self) -> list[str]:
        """Ids of all edits, oldest first."""
        return [record.edit_id for record in self.records]

    # ------------------------------------------------------------------ looking up

    def functions(self) -> dict[str, SiteFunction]:
        """Looks up at the query layer, adds blocks at the target layers."""
        query, *targets = self.paths
        return {query: self._decide, **dict.fromkeys(targets, self._add)}

    def route(self, queries: torch.Tensor) -> torch.Tensor:
        """The block of each query ``[rows, d]``, ``NO_BLOCK`` for none; ``[rows]`` int64."""
        centers = torch.stack([c.center for c in self.clusters]).to(queries.device)
        nearest_distances, nearest = distances(queries, centers).min(dim=1)
        routes = []
        for row, (distance, place) in enumerate(zip(nearest_distances.tolist(), nearest.tolist(), strict=True)):
            cluster = self.clusters[place]
            if distance > cluster.radius:
                routes.append(NO_BLOCK)
            else:
                point = distances(queries[row : row + 1], cluster.points.to(queries.device))[0].argmin()
                routes.append(cluster.blocks[int(point)])
        return torch.tensor(routes, device=queries.device)

    def _decide(self, call: SiteCall) -> None:
        if needs_whole_prompt(call.frame, "MELO"):
            call.frame.held[self.key] = self.route(call.at_key(call.output).float())

    def _add(self, call: SiteCall) -> torch.Tensor | None:
        routes = routes_of(call.frame, self.key)
        if routes is None:
            return None
        routes = routes.to(call.inputs.device)
        order = {block: place for place, block in enumerate(self.blocks)}
        places = torch.tensor([order.get(block, 0) for block in routes.tolist()], device=routes.device)
        a, b = self._stack(call.path, call.inputs.device)
        change = contribution(call.inputs, a[places], b[places], self.num_blocks)
        changed = (call.output.float() + change).to(call.output.dtype)
        return torch.where((routes != NO_BLOCK)[:, None, None], changed, call.output)

    def _stack(self, path: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All blocks at a layer: ``A [blocks, d_in, rank]``, ``B [blocks, rank, d_out]``."""
        stacked = self._stacked.get(path)
        if stacked is None or stacked[0].device != device:
            parts = [block[path] for block in self.blocks.values()]
            stacked = torch.stack([p.a for p in parts]).to(device), torch.stack([p.b for p in parts]).to(device)
            self._stacked[path] = stacked
        return stacked

    # ------------------------------------------------------------------ changing

    def free_block(self) -> int:
        """Number of the next block.

        Raises:
            EditFailedError: if all are taken.
        """
        free = next((b for b in range(self.num_blocks) if b not in self.blocks), None)
        if free is None:
            raise EditFailedError(
                f"all {self.num_blocks} blocks are taken; roll edits back, or start with more (num_blocks)"
            )
        return free

    def apply(self, batch_id: str, changes: Sequence[MELOChange], edit_ids: Sequence[str]) -> None:
        """Take over one call."""
        (change,) = changes
        check_finite("block", change.queries, *(t for block in change.factors.values() for t in block))
        queries = change.queries.detach().float().cpu()
        records = [BlockRecord(e, batch_id, change.block, t) for e, t in zip(edit_ids, change.targets, strict=True)]
        self.clusters, _ = add_batch(self.clusters, queries, records, self.radius)
        self.queries = torch.cat([self.queries, queries]) if self.records else queries
        self.records = (*self.records, *records)
        self.blocks = {**self.blocks, change.block: change.factors}
        self._stacked = {}

    def remove(self, edit_ids: Sequence[str]) -> None:
        """Build the clusters without some edits, and free blocks that no edit uses; always possible."""
        gone = set(edit_ids)
        kept = [i for i, record in enumerate(self.records) if record.edit_id not in gone]
        self._build([self.records[i] for i in kept], self.queries[kept])
        used = {record.block for record in self.records}
        self.blocks = {number: block for number, block in self.blocks.items() if number in used}
        self._stacked = {}

    def _build(self, records: Sequence[BlockRecord], queries: torch.Tensor) -> None:
        """Clusters from the beginning, call by call."""
        clusters: list[Cluster] = []
        for batch_id in dict.fromkeys(record.batch_id for record in records):
            rows = [i for i, record in enumerate(records) if record.batch_id == batch_id]
            clusters, _ = add_batch(clusters, queries[rows], [records[i] for i in rows], self.radius)
        self.records, self.queries, self.clusters = tuple(records), queries, clusters

    def snapshot(self) -> Any:
        """The present state."""
        return self.records, self.queries, self.blocks, self.clusters

    def restore(self, snapshot: Any) -> None:
        """Return to an earlier state."""
        self.records, self.queries, self.blocks, self.clusters = snapshot
        self._stacked = {}

    # ------------------------------------------------------------------ files

    def tensors(self) -> dict[str, torch.Tensor]:
        """Queries, and the blocks that are in use side by side."""
        query, *targets = self.paths
        tensors = {f"{query}.kedit_melo_points": self.queries}
        for path in targets:
            tensors[f"{path}.kedit_melo_A"] = torch.cat([block[path].a for block in self.blocks.values()], dim=1)
            tensors[f"{path}.kedit_melo_B"] = torch.cat([block[path].b for block in self.blocks.values()], dim=0)
        return tensors

    def describe(self) -> dict[str, Any]:
        """Settings, blocks and edits."""
        return {
            "paths": list(self.paths),
            "radius": self.radius,
            "num_blocks": self.num_blocks,
            "blocks": list(self.blocks),
            "edits": [
                {"edit_id": r.edit_id, "batch_id": r.batch_id, "block": r.block, "target": list(r.target)}
                for r in self.records
            ],
        }

    @classmethod
    def read(cls, model: nn.Module, paths: Sequence[str], part: Mapping[str, Any], saved: Saved) -> Self:
        """Rebuild the database; see `SiteMemory.read`."""
        if sorted(part["paths"]) != sorted(paths) or len(paths) < 2:
            raise ArtifactError(f"{saved.source}: the layers of the MELO edits are not those that are described")
        query, *targets = part["paths"]
        database = cls(part["paths"], float(part["radius"]), int(part["num_blocks"]))
        numbers = [int(n) for n in part["blocks"]]
        factors: dict[int, dict[str, Block]] = {number: {} for number in numbers}
        for path in targets:
            d_out, d_in = weight_shape(get_module(model, path))
            a = saved.tensor(f"{path}.kedit_melo_A", (d_in, None))
            b = saved.tensor(f"{path}.kedit_melo_B", (a.shape[1], d_out))
            if len(factors) != len(numbers) or not numbers or a.shape[1] % len(numbers):
                raise ArtifactError(f"{saved.source}: the blocks of {path} do not divide into {len(numbers)}")
            for number, part_a, part_b in zip(
                numbers, a.chunk(len(numbers), 1), b.chunk(len(numbers), 0), strict=True
            ):
                factors[number][path] = Block(part_a.clone(), part_b.clone())
        records = [
            BlockRecord(str(e["edit_id"]), str(e["batch_id"]), int(e["block"]), tuple(map(int, e["target"])))
            for e in part["edits"]
        ]
        if {r.block for r in records} != set(numbers):
            raise ArtifactError(f"{saved.source}: the MELO edits and their blocks do not belong together")
        width = weight_shape(get_module(model, query))[0]
        database.blocks = dict(factors)
        database._build(records, saved.tensor(f"{query}.kedit_melo_points", (len(records), width)))
        return database


def routes_of(frame: Frame, key: str) -> torch.Tensor | None:
    """The blocks that the query layer has chosen for the rows of a call; ``None`` if it could not."""
    if frame.phase == "decode":
        return held_decision(frame, key)
    return frame.held.get(key)


def contribution(inputs: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """What blocks add: ``factor · x A B`` with ``x [rows, width, d_in]``, and ``A``, ``B`` per row; fp32."""
    return factor * torch.bmm(torch.bmm(inputs.float(), a), b)


# ---------------------------------------------------------------------- the method


@register_method
class MELO(SiteMethod):
    """Edits as LoRA blocks that a database of clusters chooses among."""

    pictures = True
    config_class = MELOConfig
    capabilities = Capabilities(
        name="MELO",
        kind="adapter",
        batch=True,
        sequential=True,
        needs_subject=False,
        low_rank=False,
        paper="Yu et al. 2024, arXiv 2312.11795",
        summary="a LoRA block per call of edit, chosen at run time by clusters of prompts",
    )
    config: MELOConfig

    def targets(self) -> list[str]:
        """Names of the layers that get blocks.

        Raises:
            ConfigError: if one does not come after the query layer.
        """
        bench, (layer,) = self.bench, self.config.layers or [0]
        if self.config.target_modules is not None:
            targets = [plain_name(name) for name in self.config.target_modules]
        else:
            above = [la.down.path for la in bench.anatomy.layers[layer + 1 :] if la.down is not None]
            targets = above[:2] or [bench.anatomy.down(i).path for i in range(layer + 1, bench.anatomy.num_layers)]
        order = {name: place for place, (name, _) in enumerate(bench.model.named_modules())}
        early = [path for path in targets if order.get(path, len(order)) <= order[self.path]]
        if early or not targets:
            raise ConfigError(
                f"MELO's blocks must come after its query layer {self.path}"
                + (f", {early[0]} does not" if early else "; there is no layer above it")
            )
        return targets

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Check the layers, the database that is there, tokens and lengths."""
        super().check(requests)
        for path in self.targets():
            self.sizes(path)
        self._database().free_block()

    def _database(self) -> BlockDatabase:
        """The database at these layers, or a new one."""
        config, paths = self.config, (self.path, *self.targets())
        database = self.bench.sites.find(f"{BlockDatabase.kind}@{self.path}")
        if database is None:
            return BlockDatabase(paths, config.radius, config.num_blocks)
        assert isinstance(database, BlockDatabase)
        if (database.paths, database.radius, database.num_blocks) != (paths, config.radius, config.num_blocks):
            raise ConfigError(
                f"the MELO edits at {self.path} were begun with radius={database.radius},"
                f" num_blocks={database.num_blocks} and blocks at {', '.join(database.paths[1:])}; go on"
                " with these, or roll the edits back first"
            )
        return database

    def compute(self, requests: Sequence[EditRequest]) -> Outcome:
        """Train one block on all requests of the call, and find where their queries go."""
        examples = self.examples(requests)
        database = self._database()
        block = database.free_block()
        before = self.probabilities(examples)
        tap = Tap(self.path, "output")
        queries = self.at_key(examples, [tap])[tap]
        factors, losses = self._train(examples, database, block)
        with self.bench.sites.trying(_adding(factors, database.num_blocks), instead_of=database):
            after = self.probabilities(examples)
        records = [BlockRecord(str(r.id), "", block, e.targets) for r, e in zip(requests, examples, strict=True)]
        _, steps = add_batch(database.clusters, queries.cpu(), records, database.radius)
        report = before_and_after(before, after, losses, block=block)
        for entry, step in zip(report, steps, strict=True):
            entry |= {"action": step.action, "distance": step.distance, "forgets": list(step.forgets)}
        self.bench.note("query", queries)
        self.bench.note("losses", torch.tensor(losses))
        change = MELOChange(block, factors, queries, tuple(e.targets for e in examples))
        return Outcome([], report, [SiteEntry(database, change)])

    def initial_block(self, path: str, block: int) -> Block:
        """A new block: A uniform in ±1/√(num_blocks · rank), B zero."""
        config, (d_in, d_out) = self.config, self.sizes(path)
        bound = (config.num_blocks * config.rank) ** -0.5
        generator = torch.Generator().manual_seed(config.seed + 1009 * block + self.targets().index(path))
        a = (torch.rand(d_in, config.rank, generator=generator) * 2 - 1) * bound
        return Block(a, torch.zeros(config.rank, d_out))

    def _train(
        self, examples: Sequence[Example], database: BlockDatabase, block: int
    ) -> tuple[dict[str, Block], list[float]]:
        """Adam on one block; returns it and the loss of every step."""
        config, bench = self.config, self.bench
        factors = {}
        for path in database.paths[1:]:
            place = compute_device(get_module(bench.model, path))
            factors[path] = Block(*(t.to(place).requires_grad_(True) for t in self.initial_block(path, block)))
        optimiser = torch.optim.Adam([t for one in factors.values() for t in one], lr=config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, step_size=config.lr_step, gamma=0.5)
        losses: list[float] = []
        batch = ExampleBatch.of(bench.model, examples, bench.fill)
        with (
            bench.sites.trying(_adding(factors, database.num_blocks), instead_of=database),
            progress_bar(config.num_steps, "training a block (MELO)", show=bench.show_progress) as bar,
        ):
            for _ in range(config.num_steps):
                nll = batch.token_losses(bench.model)
                if bool(batch.held(nll, config.stop_probability).all()):
                    break
                loss = nll.mean()
                losses.append(check_loss(loss, "MELO"))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update(1)
        return {path: Block(*(t.detach().cpu() for t in one)) for path, one in factors.items()}, losses


def _adding(factors: Mapping[str, Block], factor: float) -> dict[str, SiteFunction]:
    """Site functions that add one block to every row."""

    def adding(block: Block) -> SiteFunction:
        def function(call: SiteCall) -> torch.Tensor:
            rows = call.inputs.shape[0]
            a, b = (t.to(call.inputs.device).expand(rows, -1, -1) for t in block)
            return (call.output.float() + contribution(call.inputs, a, b, factor)).to(call.output.dtype)

        return function

    return {path: adding(block) for path, block in factors.items()}
