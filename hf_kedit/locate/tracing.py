"""Causal tracing: which hidden states carry a fact to the answer? (Meng et al. 2022, arXiv 2202.05262, section 2)

The subject's token embeddings are corrupted with noise, so that the answer is lost. Then the state of one token at
one layer is put back to what it was in the clean run, and the probability of the answer tells how much that state
matters: its *indirect effect* is ``P(answer | corrupted, state restored) − P(answer | corrupted)``. Four kinds of
state can be restored:

    hidden  output of one block
    mlp     output of the MLP's last projection, in a window of layers
    attn    output of the attention's last projection, in a window of layers
    hidden_without_mlp, hidden_without_attn
            as hidden, while the MLPs (attentions) above are severed: held at their corrupted outputs at that token
            (arXiv 2210.07229, section 4.1)

All cells of a table use the same noise. Nothing here depends on a family of models: modules come from the anatomy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy import check_anatomy, resolve_anatomy
from ..anatomy.structure import unwrap
from ..anatomy.switching import Switch
from ..engine.batches import in_batches
from ..engine.capture import Tap, as_rows, listen, rewritten
from ..engine.forward import Positions, decoder_start, device_of, frozen_eval, logits_at, model_inputs
from ..engine.weights import get_module
from ..errors import AnatomyError, ConfigError, UnsupportedModelError
from ..logging import get_logger, progress
from ..requests import EditRequest
from ..tokens import (
    encode_pair,
    encode_prompt,
    encode_target,
    needed_tokenizer,
    pad_id,
    pad_rows,
    prompt_ids,
    span_tokens,
)
from .traces import TRACE_KINDS, Fact, Trace, TraceReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..anatomy import Anatomy

logger = get_logger(__name__)
WINDOW, WINDOW_DEPTH = 10, 28
NOISE_FACTOR = 3.0


# ---------------------------------------------------------------------- the public function


def causal_trace(
    model: Any,
    facts: Sequence[Fact | EditRequest | Mapping[str, Any]] | EditRequest | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    anatomy: Anatomy | None = None,
    kinds: Sequence[str] = ("hidden", "mlp", "attn"),
    samples: int = 10,
    window: int | None = None,
    noise_level: float | None = None,
    noise: torch.Tensor | None = None,
    seed: int = 1,
    known_only: bool = True,
    last_subject_only: bool = False,
    batch_size: int | None = None,
    show_progress: bool = True,
) -> TraceReport:
    """Trace facts through a model. The model is not changed.

    Args:
        model: an `EditableModel` (traced with its edits), or a transformers model together with its tokenizer.
        facts: requests or dicts with ``prompt``, ``subject`` and possibly ``ground_truth``.
        tokenizer: of a transformers model.
        anatomy: of a transformers model; ``None``: resolved here. Encoder-decoder models are traced in their
            encoder, which reads the subject.
        kinds: what to restore, out of `TRACE_KINDS`.
        samples: corrupted runs per fact.
        window: layers restored together for ``mlp`` and ``attn``; ``None``: 10, less in models of under 28 layers.
        noise_level: standard deviation of the noise; ``None``: three times that of the embeddings of the tokens of
            all subjects.
        noise: ``[samples, subject tokens, H]`` standard normal noise to use instead of drawing it (one fact only).
        seed: of the noise; each fact starts from it.
        known_only: skip facts whose ground truth the model does not give; otherwise their first answer is traced.
        last_subject_only: restore states at the last token of the subject only, which is all that `suggest_layers`
            looks at; the tables of the other tokens hold NaN.
        batch_size: rows in one forward; ``None``: 128 on a CPU, 512 elsewhere, less when memory runs out.
        show_progress: show a bar.

    Returns:
        The tables; ``skipped`` says which facts are missing and why.

    Raises:
        RequestError: for a fact without a subject in its prompt.
        ConfigError: for an unknown kind, a bad number, or a missing tokenizer.
    """
    if isinstance(facts, (EditRequest, Fact, Mapping)):
        facts = [facts]
    known = [Fact.from_value(f) for f in facts]
    base, tokenizer, anatomy, name = unpack(model, tokenizer, anatomy)
    if anatomy.is_encoder_decoder and anatomy.stack != "encoder":
        anatomy = check_anatomy(base, resolve_anatomy(base, stack="encoder"))
    unknown = [k for k in kinds if k not in TRACE_KINDS]
    if unknown or not kinds:
        raise ConfigError(
            f"unknown kind {unknown[0]!r}: use {', '.join(TRACE_KINDS)}" if unknown else "no kind was given"
        )
    if samples < 1 or (window is not None and window < 1):
        raise ConfigError("samples and window must be at least 1")
    if noise is not None and (len(known) != 1 or noise.dim() != 3):
        raise ConfigError("noise is one tensor [samples, subject tokens, H] for a single fact")
    kinds = tuple(dict.fromkeys(kinds))
    width = min(window or default_window(anatomy.num_layers), anatomy.num_layers)
    report = TraceReport(
        [], [], kinds, width, noise.shape[0] if noise is not None else samples, 0.0, seed, name, anatomy.num_layers
    )
    with frozen_eval(base), torch.no_grad():
        texts = [_Text.of(base, tokenizer, fact) for fact in known]
        level = noise_level if noise_level is not None else NOISE_FACTOR * _embedding_std(base, anatomy, texts)
        report.noise_level = float(level)
        tracer = _Tracer(base, tokenizer, anatomy, width, batch_size, last_subject_only)
        for fact, text in progress(list(zip(known, texts, strict=True)), "tracing facts", show=show_progress or None):
            reason = tracer.clean(text, fact.answers, known_only)
            if reason is not None:
                report.skipped.append((fact, reason))
                continue
            drawn = noise if noise is not None else _draw(seed, samples, text, anatomy.hidden_size)
            report.traces.append(tracer.trace(fact, text, drawn.float() * level, kinds))
    return report


def default_window(num_layers: int) -> int:
    """10 layers, as published for models of 28 to 48 layers; the same share of shallower models."""
    return WINDOW if num_layers >= WINDOW_DEPTH else max(round(WINDOW * num_layers / WINDOW_DEPTH), 1)


def window_layers(layer: int, window: int, num_layers: int) -> range:
    """The layers that are restored together around ``layer``."""
    return range(max(0, layer - window // 2), min(num_layers, layer - (-window // 2)))


def unpack(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, anatomy: Anatomy | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Anatomy, str]:
    """Return transformers model, tokenizer, anatomy and name, from an `EditableModel` or from its parts.

    Raises:
        ConfigError: if there is no tokenizer.
        UnsupportedModelError: if the model needs images or the like.
    """
    if hasattr(model, "ledger") and hasattr(model, "anatomy"):
        tokenizer, anatomy = tokenizer or model.tokenizer, anatomy or model.anatomy
        name, base = str(model.base_model_id), model.base_model
    else:
        name, base = str(getattr(model.config, "name_or_path", "") or type(model).__name__), model
    tokenizer = needed_tokenizer(tokenizer, "tracing")
    parameters = inspect.signature(unwrap(base).forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if [n for n in needed if n != "input_ids"]:
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot be run on text alone (it needs {', '.join(needed)}); trace its language"
            " model instead"
        )
    return base, tokenizer, anatomy if anatomy is not None else check_anatomy(base, resolve_anatomy(base)), name


# ---------------------------------------------------------------------- texts


@dataclass
class _Text:
    """A fact as tokens; answer and clean states are filled in by the clean run."""

    ids: list[int]
    subject: tuple[int, int]
    decoder_start: int | None
    prompt_tokens: int
    answer_ids: list[int] = field(default_factory=list)
    candidates: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fact: Fact) -> _Text:
        """Tokenise prompt and answers; find the subject."""
        encoded = encode_prompt(tokenizer, fact.prompt)
        subject = span_tokens(tokenizer, encoded, fact.span)
        if getattr(model.config, "is_encoder_decoder", False):
            ids = prompt_ids(tokenizer, fact.prompt, encoder_decoder=True)
            answers = [encode_target(tokenizer, a) for a in fact.answers]
            return cls(list(ids), subject, decoder_start(model), len(encoded.ids), candidates=answers)
        pairs = [encode_pair(tokenizer, fact.prompt, a, fact.separator) for a in fact.answers]
        answers = [list(p.target_ids) for p in pairs if p.prompt_ids == encoded.ids]
        return cls(list(encoded.ids), subject, None, len(encoded.ids), candidates=answers)

    def inputs(self, answer: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Encoder or decoder-only ids, decoder ids, and the columns that predict the answer."""
        if self.decoder_start is not None:
            return self.ids, [self.decoder_start, *answer[:-1]], list(range(max(len(answer), 1)))
        last = len(self.ids) - 1
        return [*self.ids, *answer[:-1]], [], list(range(last, last + max(len(answer), 1)))


def _draw(seed: int, samples: int, text: _Text, hidden: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, text.subject[1] - text.subject[0], hidden, generator=generator)


def _embedding_std(model: PreTrainedModel, anatomy: Anatomy, texts: Sequence[_Text]) -> float:
    """Standard deviation over all components of the embeddings of all subjects' tokens."""
    ids = torch.tensor([i for t in texts for i in t.ids[slice(*t.subject)]], device=device_of(model))
    return float(get_module(model, anatomy.embeddings)(ids.unsqueeze(0)).float().std())


# ---------------------------------------------------------------------- runs


@dataclass(frozen=True)
class _Cell:
    """One entry of a table: modules whose output at ``position`` is put back to clean, or held at corrupted."""

    position: int
    clean: tuple[str, ...]
    held: tuple[str, ...] = ()


class _Tracer:
    """Runs one fact after the other; keeps the states of the present one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        anatomy: Anatomy,
        window: int,
        batch_size: int | None,
        last_subject_only: bool,
    ):
        self.model, self.tokenizer, self.anatomy, self.window = model, tokenizer, anatomy, window
        self.last_subject_only = last_subject_only
        self.device = device_of(model)
        self.fill = pad_id(tokenizer)
        self.rows = batch_size or (128 if self.device.type == "cpu" else 512)
        self.blocks: list[str | None] = [layer.path for layer in anatomy.layers]
        # The last projection rather than the module around it: some modules add the residual stream themselves.
        self.mlps = [layer.down.path if layer.down else layer.mlp for layer in anatomy.layers]
        self.attentions = [
            layer.attention_out.path if layer.attention_out else layer.attention for layer in anatomy.layers
        ]
        self.embeddings = [anatomy.embeddings]
        if anatomy.is_encoder_decoder:  # each stack may look tokens up in a module of its own over one matrix
            shared = get_module(model, anatomy.embeddings).weight
            modules = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)]
            self.embeddings = [name for name, module in modules if module.weight is shared]
        self.states: dict[str, torch.Tensor] = {}
        self.high = 0.0

    def clean(self, text: _Text, answers: Sequence[str], known_only: bool) -> str | None:
        """Find the answer to trace, its clean probability, and all clean states; or say why there is none."""
        if answers and not text.candidates:
            return "the answer cannot be told from the prompt in tokens"
        if not text.candidates:
            text.answer_ids = [int(self._logits(text, [])[0, 0].argmax())]
        else:
            for candidate in text.candidates:
                predicted = self._logits(text, candidate)[0].argmax(-1).tolist()
                if predicted == candidate:
                    text.answer_ids = candidate
                    break
            else:
                if known_only:
                    says = self.tokenizer.decode([int(self._logits(text, [])[0, 0].argmax())])
                    return f"the model says {says!r}, not {answers[0]!r}"
                text.answer_ids = text.candidates[0]
        self.states = {}
        paths = [p for p in (*self.blocks, *self.mlps, *self.attentions) if p is not None]

        def keep(tap: Tap, tensor: torch.Tensor) -> None:
            self.states.setdefault(tap.module, as_rows(tensor, 1)[0].clone())

        with listen(self.model, [Tap(p) for p in paths], keep):
            self.high = float(self._probability(self._logits(text, text.answer_ids), text)[0])
        return None

    def trace(self, fact: Fact, text: _Text, noise: torch.Tensor, kinds: Sequence[str]) -> Trace:
        """Fill the tables of one fact."""
        corrupted: dict[str, torch.Tensor] = {}
        severed = [*(self.mlps if "hidden_without_mlp" in kinds else [])]
        severed += self.attentions if "hidden_without_attn" in kinds else []

        def keep(tap: Tap, tensor: torch.Tensor) -> None:
            corrupted.setdefault(tap.module, as_rows(tensor, noise.shape[0]).clone())

        with listen(self.model, [Tap(p) for p in severed if p is not None], keep):
            low = float(self._run(text, noise, [_Cell(0, ())], corrupted)[0])
        layers, tokens = self.anatomy.num_layers, len(text.ids)
        # Before the subject nothing is corrupted, so restoring changes nothing (unless attention looks ahead).
        positions = range(0 if text.decoder_start is not None else text.subject[0], tokens)
        if self.last_subject_only:
            positions = range(text.subject[1] - 1, text.subject[1])
        scores = {}
        for kind in kinds:
            cells = [self._cell(kind, position, layer) for position in positions for layer in range(layers)]
            table = torch.full((tokens, layers), math.nan if self.last_subject_only else low)
            table[positions.start : positions.stop] = self._run(text, noise, cells, corrupted).view(-1, layers)
            scores[kind] = table[: text.prompt_tokens]
        names = [str(self.tokenizer.decode([i])) for i in text.ids[: text.prompt_tokens]]
        answer = str(self.tokenizer.decode(text.answer_ids))
        return Trace(fact, names, text.subject, answer, self.high, low, scores)

    def _cell(self, kind: str, position: int, layer: int) -> _Cell:
        def present(paths: Sequence[str | None], which: range) -> tuple[str, ...]:
            return tuple(p for i in which if (p := paths[i]) is not None)

        layers = self.anatomy.num_layers
        if kind in ("mlp", "attn"):
            around = window_layers(layer, self.window, layers)
            return _Cell(position, present(self.mlps if kind == "mlp" else self.attentions, around))
        above = range(layer + 1, layers)
        held: tuple[str, ...] = ()
        if kind == "hidden_without_mlp":
            held = present(self.mlps, above)
        elif kind == "hidden_without_attn":
            held = present(self.attentions, above)
        return _Cell(position, present(self.blocks, range(layer, layer + 1)), held)

    def _run(
        self, text: _Text, noise: torch.Tensor, cells: Sequence[_Cell], corrupted: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Mean probability of the answer over the samples for each cell, ``[cells]`` fp32 on the CPU."""
        samples = noise.shape[0]

        def run(part: Sequence[int]) -> torch.Tensor:
            noised: list[str] = []
            with self._disturbed(text, noise, [cells[i] for i in part], corrupted, noised):
                logits = self._logits(text, text.answer_ids, rows=len(part) * samples)
            if not noised:
                raise AnatomyError(f"{self.anatomy.embeddings} took no part in the forward pass")
            return self._probability(logits, text).view(len(part), samples).mean(dim=1).cpu()

        chunks, largest = [], 1
        for part, probabilities in in_batches(range(len(cells)), max(self.rows // samples, 1), run):
            chunks.append(probabilities)
            largest = max(largest, len(part))
        if len(chunks) > 1:
            self.rows = largest * samples  # what fits is remembered for the next text
        return torch.cat(chunks)

    def _disturbed(
        self,
        text: _Text,
        noise: torch.Tensor,
        cells: Sequence[_Cell],
        corrupted: Mapping[str, torch.Tensor],
        noised: list[str],
    ) -> Switch[None]:
        """Noise on the subject's embeddings of all rows, and each cell's states put back on its own rows.

        What the noise was put on is noted in ``noised``.
        """
        samples, rows = noise.shape[0], noise.shape[0] * len(cells)
        start, end = text.subject

        def corrupt(embedded: torch.Tensor) -> torch.Tensor | None:
            if noised:  # what is embedded later are the decoder's tokens
                return None
            noised.append("subject")
            state = as_rows(embedded, rows).clone()
            state[:, start:end] += noise.to(state).repeat(len(cells), 1, 1)
            return state.view_as(embedded)

        clean: dict[str, list[int]] = {}
        held: dict[str, list[int]] = {}
        for number, cell in enumerate(cells):
            for path in cell.clean:
                clean.setdefault(path, []).append(number)
            for path in cell.held:
                held.setdefault(path, []).append(number)

        def restoring(path: str) -> Callable[[torch.Tensor], torch.Tensor]:
            def restore(output: torch.Tensor) -> torch.Tensor:
                state = as_rows(output, rows).clone()
                for number in clean.get(path, ()):
                    position = cells[number].position
                    state[number * samples : (number + 1) * samples, position] = self.states[path][position].to(state)
                for number in held.get(path, ()):
                    position = cells[number].position
                    state[number * samples : (number + 1) * samples, position] = corrupted[path][:, position].to(state)
                return state.view_as(output)

            return restore

        changes: dict[Tap, Callable[[torch.Tensor], torch.Tensor | None]] = {
            Tap(path): restoring(path) for path in {**clean, **held}
        }
        return rewritten(self.model, {**changes, **{Tap(path): corrupt for path in self.embeddings}})

    def _logits(self, text: _Text, answer: Sequence[int], rows: int = 1) -> torch.Tensor:
        """Logits at the positions that predict the answer (one position for no answer), ``[rows, tokens, vocab]``."""
        ids, decoder, columns = text.inputs(answer)
        batch = pad_rows([ids], self.fill).to(self.device).select(torch.zeros(rows, dtype=torch.long))
        kwargs = model_inputs(self.model, batch)
        scored = batch.input_ids
        if decoder:
            scored = kwargs["decoder_input_ids"] = torch.tensor([decoder] * rows, device=self.device)
        positions = Positions.of([columns] * rows, scored)
        return logits_at(self.model, kwargs, positions).float().view(rows, len(columns), -1)

    def _probability(self, logits: torch.Tensor, text: _Text) -> torch.Tensor:
        """Joint probability of the answer's tokens, ``[rows]``."""
        wanted = torch.tensor(text.answer_ids, device=logits.device).expand(logits.shape[0], -1)
        picked = logits.log_softmax(-1).gather(2, wanted.unsqueeze(2)).squeeze(2)
        return picked.sum(dim=1).exp()
