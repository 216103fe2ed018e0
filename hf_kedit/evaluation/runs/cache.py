"""What unedited models said and scored, kept in memory so that it is measured once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class PreEditCache:
    """Outputs of unedited models, kept in memory across calls.

    The key holds the model's fingerprint, its dtype and device, the tokenizer, the protocol with its settings, the
    separator, prompt and answer; so another method on the same base model finds everything it needs.

    Args:
        max_entries: the least recently used entries beyond this number are dropped.
    """

    def __init__(self, max_entries: int = 200_000):
        self.max_entries = max_entries
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def get(self, key: tuple[Any, ...]) -> Any:
        """Return the output under this key, if it is there."""
        output = self._entries.get(key)
        if output is None:
            self.misses += 1
        else:
            self.hits += 1
            self._entries.move_to_end(key)
        return output

    def put(self, key: tuple[Any, ...], output: Any) -> None:
        """Keep an output."""
        self._entries[key] = output
        self._entries.move_to_end(key)
        while len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)

    def get_or_make(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return the result under this key, or make and keep it; results are not ``None``."""
        output = self.get(key)
        if output is None:
            output = make()
            self.put(key, output)
        return output

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


PRE_EDIT_CACHE = PreEditCache()
"""The cache that all calls share unless they bring their own."""
