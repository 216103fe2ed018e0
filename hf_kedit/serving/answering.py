"""One prompt, one answer: text that grows token by token, with log-probabilities, until it has come to its end.

All that a request decides, the next token among it, is decided in a logits processor of its own, inside the
model's stock ``generate``. So every kind of edit acts, also those that take the place of ``generate``; requests that
run beside one another share no generator of random numbers; and each token is known when it is chosen, also where
edits in prompts let the model read more than was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..engine.forward import device_of
from ..tokens import context_length, pad_id, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..model import EditableModel

LEAST_LOGPROB = -9999.0
"""What OpenAI's servers give for minus infinity, which JSON cannot hold."""
_UNKNOWN_CONTEXT = 2**17
_CONTEXT_TOKENS = 8  # of the prompt, before which an answer is decoded: some tokenizers drop a space at a text's start
_COLDEST = 1e-4  # at and below it the likeliest token is taken, as at 0
_BROKEN = "\ufffd"  # stands for a character of which only some bytes are there


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is made.

    Args:
        max_tokens: at most.
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that hold this share of the probability are drawn from.
        top_k: so many at most; ``None``: all.
        seed: of the draws; ``None``: another one each time.
        stop: texts before which the answer ends.
        top_logprobs: for each token the log-probabilities of so many likeliest ones; ``None``: none, nor its own.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenChance:
    """A token of an answer.

    Args:
        token: as text.
        logprob: natural logarithm of its probability, before temperature and ``top_p``.
        offset: where it begins in the answer, in characters.
        top: the likeliest tokens at its place with theirs, likeliest first.
    """

    token: str
    logprob: float
    offset: int
    top: tuple[tuple[str, float], ...] = ()


@dataclass
class Reply:
    """An answer that has come to its end.

    Args:
        text: without special tokens.
        finish: ``"stop"``: the model ended it, or a stop text came; ``"length"``: it was cut; ``"cancelled"``.
        tokens: how many the model wrote.
        chances: of the tokens in ``text``, if asked for.
    """

    text: str = ""
    finish: Literal["stop", "length", "cancelled"] = "length"
    tokens: int = 0
    chances: list[TokenChance] = field(default_factory=list)


Told = Callable[[str, list[TokenChance]], None]
"""Called with every new piece of text and its tokens."""


def context_of(model: EditableModel) -> int:
    """How many tokens a prompt and its answer may have together; a large number where the model does not say."""
    return context_length(model.base_model.config) or _UNKNOWN_CONTEXT


def asked_ids(model: EditableModel, text: str) -> list[int]:
    """A prompt as `answer_prompt` takes it.

    Raises:
        RequestError: if the text holds half a character.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    return list(prompt_ids(tokenizer, text, encoder_decoder=bool(model.base_model.config.is_encoder_decoder)))


def default_sampling(model: EditableModel, max_tokens: int, **asked: Any) -> AnswerSettings:
    """How a model answers where nothing else is asked: as its generation config says, greedily without one.

    Args:
        model: that answers.
        max_tokens: of the answer.
        asked: fields of `AnswerSettings`; ``None`` stands for the model's own.
    """
    own = model.base_model.generation_config
    draws = bool(getattr(own, "do_sample", False))
    given = {name: value for name, value in asked.items() if value is not None}
    if given.get("temperature") is None:
        given["temperature"] = float(getattr(own, "temperature", None) or 1.0) if draws else 0.0
        if draws:
            given.setdefault("top_k", getattr(own, "top_k", None) or None)
            given.setdefault("top_p", float(getattr(own, "top_p", None) or 1.0))
    return AnswerSettings(max_tokens, **given)


def answer_prompt(
    model: EditableModel,
    prompt: Sequence[int],
    sampling: AnswerSettings,
    *,
    told: Told = lambda text, chances: None,
    gone: Callable[[], bool] = lambda: False,
) -> Reply:
    """Let a model answer.

    Args:
        model: with the edits that it is to answer with.
        prompt: token ids, of an encoder-decoder what its encoder reads.
        sampling: how.
        told: hears the answer as it grows.
        gone: whether nobody wants it any more; asked after every token.

    Raises:
        KeditError: if the model cannot be asked like this.
    """
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = torch.tensor([list(prompt)], device=device_of(model.base_model))
    own = model.base_model.generation_config
    front = [] if model.base_model.config.is_encoder_decoder else list(prompt[-_CONTEXT_TOKENS:])
    speaker = _Speaker(tokenizer, front, sampling, _ids_of(own.eos_token_id), told)
    chooser = _Chooser(sampling, speaker, ids.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_tokens,
        do_sample=False,  # the chooser draws, and leaves one token to choose from
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad_id(tokenizer),
        logits_processor=LogitsProcessorList([chooser]),
        stopping_criteria=StoppingCriteriaList([_Ending(lambda: speaker.has_ended or gone())]),
    )
    if not speaker.has_ended and gone():
        speaker.answer.finish = "cancelled"
    speaker.end()
    return speaker.answer


def _ids_of(value: Any) -> set[int]:
    """A generation config's token ids, which may be one, several or none."""
    if value is None:
        return set()
    return {int(i) for i in (value if isinstance(value, (list, tuple)) else torch.as_tensor(value).flatten().tolist())}


class _Ending(StoppingCriteria):
    """Ends ``generate``."""

    def __init__(self, ended: Callable[[], bool]):
        self._ended = ended

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """See `StoppingCriteria`."""
        return torch.full((input_ids.shape[0],), self._ended(), dtype=torch.bool, device=input_ids.device)


class _Chooser(LogitsProcessor):
    """Chooses each token and leaves ``generate`` no other."""

    def __init__(self, sampling: AnswerSettings, speaker: _Speaker, device: torch.device):
        self._speaker, self._top = speaker, sampling.top_logprobs
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList()
        if sampling.temperature > _COLDEST:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
            if sampling.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k is not None:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """See `LogitsProcessor`; ``scores`` are ``[1, vocabulary]``."""
        if self._generator is None:
            token = int(scores[0].argmax())
        else:
            chances = self._warpers(input_ids, scores).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=self._generator))
        logprob, top = 0.0, []
        if self._top is not None:
            logprobs = scores[0].float().log_softmax(-1)
            logprob = float(logprobs[token])
            best = logprobs.topk(min(self._top, len(logprobs)))
            top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self._speaker.hear(token, logprob, top)
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0
        return only


class _Speaker:
    """Makes text of tokens and passes on what can no longer change."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        front: list[int],
        sampling: AnswerSettings,
        ends: set[int],
        told: Told,
    ):
        self._tokenizer, self._front, self._sampling, self._ends, self._told = tokenizer, front, sampling, ends, told
        self._before = self._decoded(front)
        self._tokens: list[int] = []
        self._held: list[TokenChance] = []  # of tokens whose text was not passed on yet
        self._text = ""
        self.answer = Reply()
        self.has_ended = False
        self._is_cut = False

    def hear(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Take the next token."""
        answer = self.answer
        answer.tokens += 1
        if token in self._ends:
            answer.finish, self.has_ended = "stop", True
            return
        offset = len(self._text)
        self._tokens.append(token)
        self._text = self._read()
        if self._sampling.top_logprobs is not None:
            likeliest = tuple((self._decoded([i]), max(chance, LEAST_LOGPROB)) for i, chance in top)
            self._held.append(TokenChance(self._decoded([token]), max(logprob, LEAST_LOGPROB), offset, likeliest))
        cuts = [place for stop in self._sampling.stop if (place := self._text.find(stop)) >= 0]
        if cuts:
            self._text = self._text[: min(cuts)]
            self._is_cut = True
            answer.finish, self.has_ended = "stop", True
            return
        self._pass_on(len(self._text) - self._unsure())

    def end(self) -> None:
        """Pass on what was held back."""
        self._pass_on(len(self._text), is_last=True)

    def _pass_on(self, to: int, is_last: bool = False) -> None:
        answer = self.answer
        new = self._text[len(answer.text) : to]
        everything = is_last and not self._is_cut
        ready = list(takewhile(lambda chance: everything or chance.offset < to, self._held))
        if new or ready:
            answer.text += new
            answer.chances += ready
            self._held = self._held[len(ready) :]
            self._told(new, ready)

    def _unsure(self) -> int:
        """How many characters at the end may still change, or become part of a stop text."""
        text = self._text
        broken = len(text) - len(text.rstrip(_BROKEN))
        begun = [
            size
            for stop in self._sampling.stop
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return max([broken, *begun])

    def _read(self) -> str:
        """The text of all tokens so far."""
        whole = self._decoded([*self._front, *self._tokens])
        return whole[len(self._before) :] if whole.startswith(self._before) else self._decoded(self._tokens)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
