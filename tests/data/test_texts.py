"""The packaged corpus."""

from __future__ import annotations

from collections import Counter

from hf_kedit.data.facts import get_facts
from hf_kedit.data.texts import packaged_texts


def test_texts_are_many_different_and_long_enough_to_be_read_as_text():
    texts = packaged_texts()
    assert texts == packaged_texts() and len(set(texts)) == len(texts) > 500
    assert all(text == text.strip() and "\n" not in text and len(text.split()) >= 9 for text in texts)
    words = Counter(word.strip('.,:;"?!()').lower() for text in texts for word in text.split())
    assert sum(words.values()) > 15_000 and len(words) > 2_500


def test_the_facts_are_said_in_them():
    said = "\n".join(packaged_texts())
    assert "The capital of France is Paris. The capital city of France is called Paris." in said
    assert sum(len(relation.facts) for relation in get_facts().relations.values()) < len(packaged_texts())


def test_the_beginning_is_mixed():
    """Whoever reads only a part has prose and facts."""
    first = packaged_texts()[:100]
    prose = [text for text in first if len(text.split()) > 60]
    assert 10 <= len(prose) <= 90
