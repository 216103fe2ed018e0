"""What stands in the place of a transformers model where there is only something that answers texts."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..errors import BackendError, ConfigError, KeditError, UnsupportedModelError, reason_of, shown
from .backend import TargetScores, TextBackend, TextOrMessages, check_asked

LENGTH = 64
"""Tokens of an answer, unless something else is asked for."""
_ROUNDING = 0.01


class RemoteModel(nn.Module):
    """A model without weights: text in, text out.

    It is a module so that the books, locks and switches of an edited model hold it as they hold any other. Everything
    that would look inside a model finds nothing here and says so.

    Args:
        backend: answers.

    Attributes:
        rewrite: what a user's text becomes before the backend reads it; ``None``: nothing else. The edits sit here.
        identity: tells this object from every other one, for caches of answers.

    Raises:
        ConfigError: if ``backend`` cannot answer.
    """

    def __init__(self, backend: TextBackend):
        super().__init__()
        if not callable(getattr(backend, "generate", None)):
            raise ConfigError(
                f"a backend needs a method generate(prompt, max_new_tokens, stop, temperature);"
                f" {type(backend).__name__} has none"
            )
        self.workers = getattr(backend, "max_workers", 1)
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise ConfigError(f"max_workers of a backend must be a whole number above 0, not {shown(self.workers)}")
        self.backend = backend
        self.name = str(getattr(backend, "name", None) or type(backend).__name__)
        self.config = PretrainedConfig()
        self.config.name_or_path = self.name
        self.identity = uuid.uuid4().hex
        self.rewrite: Callable[[str], str] | None = None
        # Whoever asks a model for its device and number format looks at a parameter.
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)

    dtype = torch.float32

    @property
    def chats(self) -> bool:
        """Whether a text is put to the model as what a user says."""
        return bool(getattr(self.backend, "chat", False))

    def generate(
        self,
        prompt: TextOrMessages,
        max_new_tokens: int = LENGTH,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        *,
        edited: bool = True,
    ) -> str:
        """The new text behind a prompt.

        Args:
            prompt: a text, or a conversation, of which the user's last turn is looked up among the edits.
            max_new_tokens: at most so many tokens.
            stop: end before the first of these.
            temperature: 0 for the most probable text.
            edited: look it up among the edits; otherwise the backend reads it as it is.

        Raises:
            BackendError: if there is no answer, or what is asked is not as `check_asked` wants it.
        """
        stops = check_asked(prompt, max_new_tokens, stop, temperature)
        asked = self._rewritten(prompt) if edited else prompt
        answer = self._call("generate", asked, max_new_tokens, stops, temperature)
        if not isinstance(answer, str):
            raise BackendError(f"the backend {self.name!r} answered with {shown(answer)}, which is no text")
        cuts = [place for end in stops if (place := answer.find(end)) >= 0]  # not every server looks for them
        return answer[: min(cuts)] if cuts else answer

    def answers(
        self, prompts: Sequence[TextOrMessages], max_new_tokens: int = LENGTH, stop: Sequence[str] = ()
    ) -> list[str]:
        """The new text behind each of many prompts, as many at a time as the backend bears."""
        return self._in_parallel(lambda prompt: self.generate(prompt, max_new_tokens, stop), prompts)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[TargetScores | float | None]:
        """What the backend thinks of (prompt, target) pairs: token by token, as one logarithm, or ``None``."""
        return self._in_parallel(lambda pair: self._score(*pair), pairs)

    def _score(self, prompt: str, target: str) -> TargetScores | float | None:
        prompt = str(self._rewritten(prompt))
        if callable(getattr(self.backend, "target_scores", None)):
            found: TargetScores | None = self._call("target_scores", prompt, target)
            if found is not None:
                return self._checked(found)
        if not callable(getattr(self.backend, "loglikelihood", None)):
            return None
        value = self._call("loglikelihood", prompt, target)
        return None if value is None else self._checked(TargetScores((value,), ())).log_probabilities[0]

    def _checked(self, found: TargetScores) -> TargetScores:
        """Scores of a backend, whose numbers are as Python's own.

        Raises:
            BackendError: if they are no logarithms of probabilities (one may be a little above 0, by rounding).
        """
        try:
            values, best = tuple(map(float, found.log_probabilities)), tuple(map(bool, found.most_probable))
        except (AttributeError, TypeError, ValueError):
            values, best = (), ()
        if not values or len(best) not in (0, len(values)) or not all(value < _ROUNDING for value in values):
            raise BackendError(
                f"the backend {self.name!r} gave {shown(found)}, which is no logarithm of a probability"
            )
        return TargetScores(values, best)

    def _rewritten(self, prompt: TextOrMessages) -> TextOrMessages:
        if self.rewrite is None or not prompt:
            return prompt
        if isinstance(prompt, str):
            return self.rewrite(prompt)
        turns = [dict(turn) for turn in prompt]
        last = max((i for i, turn in enumerate(turns) if turn.get("role") == "user"), default=None)
        if last is not None:
            turns[last]["content"] = self.rewrite(turns[last]["content"])
        return turns

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self.backend, name)(*arguments)
        except KeditError:
            raise
        except Exception as error:
            raise BackendError(f"the backend {self.name!r} failed: {reason_of(error)}") from error

    def _in_parallel(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        workers = min(self.workers, len(items))
        if workers < 2:
            return [ask(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(ask, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # a server that is gone is not asked a thousand times
                raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing to run.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"{self.name!r} is a model behind an API: it takes and gives text (generate), and has no states, weights"
            " or logits"
        )
