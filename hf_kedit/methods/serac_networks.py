"""The scope classifier of SERAC and its losses (Mitchell et al. 2022, arXiv 2206.06520, sections 3.1 and 3.2).

A stored edit and a prompt become vectors of one encoder, and their similarity falls with their distance,

    s(edit, x) = exp(−‖e(edit) − e(x)‖²)                                       (``exp_square``, the published form)

or one encoder reads both at once and a linear layer decides (``cross``): slower, one run per pair. The counterfactual
model is any language model of the base model's tokens. Nothing here knows what an edit is.

Of a base model that sees, what it makes of a picture (`engine.looks`) is compared, too, through a trained matrix P:

    s(edit, x) = s(words) · exp(−‖P f(edit) − P f(x)‖²)            with f of length 1, and 0 where there is no picture
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, LlamaConfig, T5Config

from ..books.retrieval import Passage
from ..engine.forward import accepts, decoder_start
from ..errors import ConfigError
from ..tokens import context_length, pad_rows, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Looks = Sequence[torch.Tensor | None]
"""What a base model makes of the pictures of some texts, ``[d]`` each; ``None`` without any."""
Similarity = Literal["exp_square", "exp", "cosine", "cross"]
Pooling = Literal["mean", "first"]
_SMALLEST = 1e-7
"""Least distance of an unrelated prompt in the loss: of 1 − s = 0 there is no logarithm."""
HEAD_SIZE = 32


class ScopeClassifier(nn.Module):
    """Says how similar prompts are to stored edits.

    Args:
        encoder: transformers config of the encoder, as a dict.
        similarity: see the module's text; ``exp`` takes the distance itself, ``cosine`` ``1 − cos`` in its place.
        pooling: the vector of a text: the mean of its tokens' states, or the first one's ([CLS]).
        look: length of what the base model makes of a picture; ``None``: it sees none.
    """

    def __init__(self, encoder: dict[str, Any], similarity: Similarity, pooling: Pooling, look: int | None = None):
        super().__init__()
        self.similarity, self.pooling = similarity, pooling
        self.encoder: nn.Module = _without_pooler(AutoConfig.for_model(**encoder))
        size = int(self.encoder.config.hidden_size)
        self.pair = nn.Linear(size, 1) if similarity == "cross" else None
        self.eye = None if look is None else nn.Linear(look, size, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors ``[texts, d]`` of padded texts ``[texts, width]``; ``kinds`` tells two parts of a text apart."""
        given = {"input_ids": ids, "attention_mask": mask}
        if kinds is not None and accepts(self.encoder, "token_type_ids"):
            given["token_type_ids"] = kinds
        states = self.encoder(**given).last_hidden_state
        if self.pooling == "first":
            return states[:, 0]
        real = mask.unsqueeze(-1).to(states.dtype)
        return (states * real).sum(1) / real.sum(1).clamp(min=1)

    def log_similarity(self, prompts: Sequence[Sequence[int]], edits: Sequence[Sequence[int]]) -> torch.Tensor:
        """``log s`` of token ids of prompts and of stored edits, ``[prompts, edits]``, never above 0."""
        if self.pair is None:
            return self.log_similarity_of(self.vectors(prompts), self.vectors(edits))
        rows, kinds = [], []
        for prompt in prompts:
            for edit in edits:
                rows.append([*edit, *prompt])
                kinds.append([0] * len(edit) + [1] * len(prompt))
        if not rows:
            return torch.zeros(len(prompts), len(edits))
        batch, parts = (pad_rows(r, 0).to(self.device) for r in (rows, kinds))
        states = self(batch.input_ids, batch.attention_mask, parts.input_ids)
        return nn.functional.logsigmoid(self.pair(states)).reshape(len(prompts), len(edits))

    def log_sight(self, prompts: Looks, edits: Looks) -> torch.Tensor:
        """The part of pictures in ``log s``, ``[prompts, edits]``; 0 for a base model that sees none."""
        if self.eye is None:
            return torch.zeros(len(prompts), len(edits), device=self.device)
        none = torch.zeros(self.eye.in_features)
        rows = [torch.stack([none if look is None else look for look in looks]) for looks in (prompts, edits)]
        asked, stored = (self.eye(nn.functional.normalize(r.to(self.device), dim=-1)) for r in rows)
        return -(asked[:, None] - stored[None]).square().sum(-1)

    def log_similarity_of(self, prompts: torch.Tensor, edits: torch.Tensor) -> torch.Tensor:
        """``log s`` of vectors, ``[prompts, edits]``."""
        if self.similarity == "cosine":
            unit = nn.functional.normalize
            return unit(prompts, dim=-1) @ unit(edits, dim=-1).T - 1
        squares = (prompts[:, None] - edits[None]).square().sum(-1)
        # The root has no gradient at 0, where a prompt is the stored text itself.
        return -squares if self.similarity == "exp_square" else -squares.clamp(min=_SMALLEST**2).sqrt()

    def vectors(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Vectors ``[texts, d]`` of token ids."""
        batch = pad_rows([list(t) for t in texts], 0).to(self.device)
        return self(batch.input_ids, batch.attention_mask)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


def classifier_loss(related: torch.Tensor, unrelated: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """``mean(−log s⁺) + mean(−log(1 − s⁻))``: both kinds count the same, however many there are (equation 4).

    Args:
        related: ``log s`` of other wordings ``[n, n]``; those on the diagonal belong together.
        unrelated: ``log s`` of unrelated prompts ``[n, n]``.
        negatives: the pairs of ``unrelated`` that count, ``[n, n]`` bool.
    """
    apart = unrelated[negatives].clamp(max=-_SMALLEST)
    return -related.diagonal().mean() - (-torch.expm1(apart)).log().sum() / max(len(apart), 1)


# ---------------------------------------------------------------------- sizes


def small_encoder(vocabulary: int, size: int, layers: int) -> dict[str, Any]:
    """Config of an encoder to be trained from scratch (BERT's architecture)."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        num_hidden_layers=layers,
        num_attention_heads=max(size // HEAD_SIZE, 1),
        intermediate_size=4 * size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,  # padding is masked, and no row of the embedding is lost to it
    )
    return described(config)


def small_reader(model: PreTrainedModel, size: int, layers: int) -> dict[str, Any]:
    """Config of a counterfactual model to be trained from scratch, with the tokens of a base model."""
    base = model.config.get_text_config(decoder=True)
    heads = max(size // HEAD_SIZE, 1)
    common: dict[str, Any] = {"vocab_size": vocabulary_size(model), "tie_word_embeddings": True}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        common[name] = getattr(base, name, None)
    if model.config.is_encoder_decoder:
        start = decoder_start(model)
        sizes = {"d_model": size, "d_ff": 4 * size, "num_layers": layers, "num_heads": heads, "d_kv": size // heads}
        common |= sizes | {"dropout_rate": 0.0, "decoder_start_token_id": start}
        return described(T5Config(**common))
    width = context_length(model.config) or 2048
    return described(
        LlamaConfig(
            **common,
            hidden_size=size,
            intermediate_size=3 * size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=2 * width,  # the edit stands in front of the prompt
        )
    )


def described(config: Any) -> dict[str, Any]:
    """A transformers config as a dict from which `AutoConfig.for_model` makes it again."""
    values = config.to_diff_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "architectures"):
        values.pop(name, None)
    values["model_type"] = config.model_type
    return dict(values)


def _without_pooler(config: Any) -> Any:
    """The encoder of a config; what stands behind its last state is not used, and would be trained by nothing."""
    kind = AutoModel.from_config(config)
    if hasattr(kind, "pooler"):
        kind.pooler = None
    return kind


# ---------------------------------------------------------------------- texts


class ScopeTokenizer:
    """Texts as token ids for the scope classifier; kept with it, as it need not be the base model's.

    Args:
        tokenizer: fast tokenizer.
        longest: what is longer is cut from the left: the subject and the question stand at the end.

    Raises:
        ConfigError: if it is not a fast one.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int):
        self.tokenizer, self.longest = tokenizer, longest

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, longest: int) -> ScopeTokenizer:
        """That of a transformers tokenizer."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError("SERAC's scope classifier needs a fast tokenizer (one with a tokenizer.json)")
        made = Tokenizer.from_str(backend.to_str())
        made.no_padding()
        made.no_truncation()
        return cls(made, longest)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts."""
        return [encoding.ids[-self.longest :] for encoding in self.tokenizer.encode_batch(list(texts))]


class TrainedScope:
    """A trained scope classifier as a retriever, by which the prompt memory looks edits up.

    Args:
        name: how saved edits call it.
        classifier: in evaluation mode.
        tokenizer: of its texts.
    """

    def __init__(self, name: str, classifier: ScopeClassifier, tokenizer: ScopeTokenizer):
        self.name, self.classifier, self.tokenizer = name, classifier, tokenizer
        self.sight = None if classifier.eye is None else self._sight

    @torch.no_grad()
    def _sight(self, asked: torch.Tensor | None, stored: torch.Tensor | None) -> float:
        """How alike two pictures are, by which the similarity of the words is multiplied (`PromptBook`)."""
        return float(self.classifier.log_sight([asked], [stored]).exp())

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor | None:
        """Vectors of stored texts; ``None`` for ``cross``, which reads the texts themselves."""
        if self.classifier.pair is not None:
            return None
        return self.classifier.vectors(self.tokenizer(texts)).float().cpu()

    @torch.no_grad()
    def similarity(
        self, queries: Sequence[str], passages: Sequence[Passage], embedded: torch.Tensor | None
    ) -> torch.Tensor:
        """``s``, see `Retriever.similarity`."""
        asked = self.tokenizer(queries)
        if self.classifier.pair is not None:
            return self.classifier.log_similarity(asked, self.tokenizer([p.text for p in passages])).exp()
        stored = self.embed([p.text for p in passages]) if embedded is None else embedded
        assert stored is not None
        vectors = self.classifier.vectors(asked)
        return self.classifier.log_similarity_of(vectors, stored.to(vectors)).exp()
