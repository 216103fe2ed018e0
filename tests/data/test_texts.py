"""The packaged corpus."""

from __future__ import annotations

from collections import Counter

from hf_kedit.data.texts import packaged_texts


def test_texts_are_many_different_and_long_enough_to_be_read_as_text():
    texts = packaged_texts()
    assert len(set(texts)) == len(texts) >= 90
    assert all(text == text.strip() and "\n" not in text and 40 <= len(text.split()) <= 200 for text in texts)
    words = Counter(word.strip('.,:;"?!()').lower() for text in texts for word in text.split())
    assert sum(words.values()) > 8_000 and len(words) > 2_000
