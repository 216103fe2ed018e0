"""Continuations of many prompts in few batches, and their post-processing.

The generation config is made here, so that nothing a checkpoint ships with (sampling, penalties) leaks in. Like
`scoring`, this works on texts, does not change the tokenizer, and knows nothing of edits, cases or metrics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ...anatomy.switching import Switch, switched
from ...engine.forward import decoder_start, device_of, frozen_eval, generating, generation_inputs
from ...errors import ChatTemplateError, EvaluationError, shown
from ...remote.backend import TextOrMessages
from ...remote.model import RemoteModel
from ...text.chat import chat_text
from ...text.pictures import PicturedText
from ...tokens import context_length, pad_id, pad_rows, prompt_ids
from .batching import (
    TOKEN_BUDGET,
    cut_left,
    is_encoder_decoder,
    make_batches,
    shown_batches,
    stand_in_bos,
    stock_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PromptFormat = Literal["raw", "qa", "chat"]


@dataclass(frozen=True)
class Sampling:
    """Top-k sampling that does not depend on the batch: each prompt has its own random numbers.

    Args:
        top_k: sample among so many most probable tokens.
        seed: of the random numbers, together with the prompt.
    """

    top_k: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Continuation:
    """A continuation of a prompt.

    Args:
        prompt: text as it was given, before formatting.
        text: the new text after post-processing (cut at the first newline where asked, stripped).
        ids: new token ids without padding and without the end token.
        finished: whether the model ended by itself (end token), or the rest was cut at a newline or stop string.
        truncated: number of prompt tokens that were cut off at the left to fit the model's context.
        target: the answer that it is compared with token by token, where a protocol does that.
        target_ids: tokens of this answer behind the prompt.
    """

    prompt: str
    text: str
    ids: tuple[int, ...]
    finished: bool
    truncated: int = 0
    target: str | None = None
    target_ids: tuple[int, ...] = ()


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 50,
    token_budget: int = TOKEN_BUDGET,
    *,
    prompt_format: PromptFormat = "raw",
    cut_at_newline: bool | None = None,
    stop_strings: Sequence[str] = (),
    max_batch_rows: int | None = None,
    sampling: Sampling | None = None,
) -> list[Continuation]:
    """Continue prompts, greedily unless ``sampling`` says otherwise.

    Batches are padded at the left with an explicit mask. The generation config is made here: sampling settings,
    penalties and length limits that a checkpoint ships with do not apply.

    Args:
        model: causal or encoder-decoder language model; put into evaluation mode meanwhile.
        tokenizer: of the model; not changed.
        prompts: texts; equal ones are continued once.
        max_new_tokens: at most so many new tokens; the model's end token ends earlier.
        token_budget: padded tokens (prompt and continuation) per batch.
        prompt_format: ``raw``; ``qa`` (a question-and-answer frame); or ``chat`` (the tokenizer's chat template).
        cut_at_newline: keep only the first line; ``None``: yes for ``raw`` and ``qa``.
        stop_strings: cut before the first occurrence of any of these. Off by default: "." would cut "U.S.".
        max_batch_rows: upper bound of the rows per batch.
        sampling: sample instead of taking the most probable token.

    Returns:
        One continuation per prompt, in the order of ``prompts``.

    Raises:
        EvaluationError: for an unknown format, ``max_new_tokens < 1``, a chat format without a template, or a
            context too short for the new tokens.
    """
    model = stock_model(model)
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if isinstance(model, RemoteModel):
        if sampling is not None:
            raise EvaluationError(f"{model.name!r} is behind an API: its answers cannot be sampled by our numbers")
        return _ask_remote(model, prompts, max_new_tokens, prompt_format, cut_at_newline, stop_strings)
    encoder_decoder = is_encoder_decoder(model)
    limit = context_length(model.config)
    room = limit if encoder_decoder or limit is None else limit - max_new_tokens
    if room is not None and room < 1:
        raise EvaluationError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {limit}")
    cut_lines = prompt_format in ("raw", "qa") if cut_at_newline is None else cut_at_newline
    rows: dict[str, Sequence[int]] = {}
    cuts: dict[str, int] = {}
    for prompt in dict.fromkeys(prompts):
        ids = _prompt_ids(tokenizer, prompt, prompt_format, encoder_decoder) or [stand_in_bos(tokenizer)]
        rows[prompt], cuts[prompt] = cut_left(tokenizer, ids, len(ids) + 1, room)
    config = _greedy_config(model, tokenizer, max_new_tokens)
    results: dict[str, Continuation] = {}
    with frozen_eval(model), generating(), torch.inference_mode(), _generation_config(model, config):
        batches = make_batches(rows, lambda p: len(rows[p]) + max_new_tokens, token_budget, max_rows=max_batch_rows)
        for group in shown_batches(batches, len(rows), "writing answers"):
            noise = None if sampling is None else _SeededTopK(sampling, group)
            continued = _generate_batch(
                model, tokenizer, [rows[p] for p in group], config, cut_lines, stop_strings, noise
            )
            for prompt, (text, ids, finished) in zip(group, continued, strict=True):
                results[prompt] = Continuation(prompt, text, tuple(ids), finished, cuts[prompt])
    return [results[p] for p in prompts]


def _ask_remote(
    model: RemoteModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    prompt_format: PromptFormat,
    cut_at_newline: bool | None,
    stop_strings: Sequence[str],
) -> list[Continuation]:
    """The same from a model that only gives text: no token ids, and whether it ended by itself is not known.

    Cut at the first newline is, unless asked for otherwise, what a model writes that goes on with a text; one that
    is told things by a user answers, and that answer counts.
    """
    cut_lines = prompt_format != "chat" and not model.chats if cut_at_newline is None else cut_at_newline
    asked: dict[str, TextOrMessages] = {}
    for prompt in prompts:
        chat: TextOrMessages = [{"role": "user", "content": prompt}]
        asked[prompt] = chat if prompt_format == "chat" else format_prompt(prompt, prompt_format)
    texts = model.answers(list(asked.values()), max_new_tokens, tuple(stop_strings))
    lines = (text.lstrip().partition("\n")[0] if cut_lines else text for text in texts)
    given = {prompt: Continuation(prompt, text.strip(), (), False) for prompt, text in zip(asked, lines, strict=True)}
    return [given[prompt] for prompt in prompts]


def format_prompt(prompt: str, prompt_format: PromptFormat) -> str:
    """Put a prompt into its text frame (``chat`` needs the tokenizer and is done on token level)."""
    return f"Please answer the question:\n\nQ: {prompt}\nA:" if prompt_format == "qa" else prompt


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_format: PromptFormat, encoder_decoder: bool
) -> Sequence[int]:
    if isinstance(prompt, PicturedText) and prompt_format in ("qa", "chat"):
        raise EvaluationError(f"prompt_format={prompt_format!r} frames text; requests with images are put as they are")
    if prompt_format not in ("raw", "qa", "chat"):
        raise EvaluationError(f"unknown prompt_format {shown(prompt_format)}: use 'raw', 'qa' or 'chat'")
    if prompt_format == "chat":
        try:
            text = chat_text(tokenizer, prompt)
        except ChatTemplateError as error:
            raise EvaluationError(f"prompt_format='chat': {error}") from error
    else:
        text = format_prompt(prompt, prompt_format)
    return prompt_ids(tokenizer, text, encoder_decoder=encoder_decoder)


def _generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    cut_lines: bool,
    stop_strings: Sequence[str],
    noise: LogitsProcessor | None = None,
) -> Iterator[tuple[str, list[int], bool]]:
    encoder_decoder = is_encoder_decoder(model)
    # An encoder reads padding on the right as in training; a decoder must have its prompt at the right edge.
    batch = pad_rows(rows, pad_id(tokenizer), "right" if encoder_decoder else "left").to(device_of(model))
    criteria = [_FirstLineWritten(tokenizer)] if cut_lines else []
    output = model.generate(
        **generation_inputs(model, batch),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList(criteria),
        logits_processor=LogitsProcessorList([] if noise is None else [noise]),
    )
    new = output[:, 1:] if encoder_decoder else output[:, batch.input_ids.shape[1] :]
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for row in new.tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        stop = criteria[0].line(row) if criteria else None
        length = min(len(row) if end is None else end, len(row) if stop is None else stop)
        text = str(tokenizer.decode(row[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        cut = [text.find(s) for s in (*(["\n"] if cut_lines else []), *stop_strings) if s in text]
        yield (text[: min(cut)] if cut else text).strip(), row[:length], end is not None or bool(cut)


class _SeededTopK(LogitsProcessor):
    """Turns greedy decoding into top-k sampling: adding Gumbel noise to log-probabilities and taking the largest
    is sampling. Every row draws from its own generator, so that the batch around it does not matter."""

    def __init__(self, sampling: Sampling, prompts: Sequence[str]):
        self.top_k = sampling.top_k
        self.generators = []
        for prompt in prompts:
            digest = hashlib.sha256(f"{sampling.seed}\n{prompt}".encode()).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        values, places = scores.float().topk(min(self.top_k, scores.shape[-1]), dim=-1)
        uniform = torch.stack([torch.rand(values.shape[-1], generator=g) for g in self.generators])
        noise = -(-uniform.clamp_min(1e-30).log()).clamp_min(1e-30).log()
        best = (values + noise.to(values.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, places.gather(-1, best), 0.0)


class _FirstLineWritten(StoppingCriteria):
    """Ends a row once it has written a newline, behind which the answer is cut anyway.

    It remembers nothing of the rows: what stands between a model and its callers may generate them in several calls.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.has_newline: dict[int, bool] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = [self._ends(token) for token in input_ids[:, -1].tolist()]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)

    def line(self, row: Sequence[int]) -> int | None:
        """How many of a row's new tokens belong to its first line, the newline included; padding follows."""
        return next((i + 1 for i, token in enumerate(row) if self._ends(token)), None)

    def _ends(self, token: int) -> bool:
        if token not in self.has_newline:
            self.has_newline[token] = "\n" in self.tokenizer.decode([token])
        return self.has_newline[token]


def _greedy_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Plain greedy decoding with nothing but the structural tokens of the model's own config."""
    own = getattr(model, "generation_config", None)
    eos = getattr(own, "eos_token_id", None)
    structural = {
        name: getattr(own, name, None) for name in ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    }
    if is_encoder_decoder(model) and structural["decoder_start_token_id"] is None:
        structural["decoder_start_token_id"] = decoder_start(model)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=eos if eos is not None else tokenizer.eos_token_id,
        pad_token_id=pad_id(tokenizer),
        **structural,
    )


def _generation_config(model: Any, config: GenerationConfig) -> Switch[None]:
    """Give the model this generation config and put its own back.

    ``generate`` fills whatever is unset in the config it is given from ``model.generation_config``, so that passing
    a config is not enough to keep a checkpoint's penalties out.
    """
    holders = [model]
    if hasattr(model, "get_base_model"):
        holders.append(model.get_base_model())
    before = [(holder, holder.generation_config) for holder in holders if hasattr(holder, "generation_config")]

    def give() -> None:
        for holder, _ in before:
            holder.generation_config = config

    def put_back() -> None:
        for holder, own in before:
            holder.generation_config = own

    return switched(give, put_back)
