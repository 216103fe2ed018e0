"""Fixtures: tiny models, something that edits them, and a few edits with probes."""

from __future__ import annotations

import pytest

from hf_kedit.evaluation import PreEditCache

from .helpers import make_editable, tiny_gpt2, tiny_t5, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def gpt2(tokenizer):
    return tiny_gpt2(tokenizer)


@pytest.fixture
def t5(tokenizer):
    return tiny_t5(tokenizer)


@pytest.fixture
def editable(gpt2, tokenizer):
    return make_editable(gpt2, tokenizer)


@pytest.fixture
def cache():
    """An own cache, so that tests do not see each other's pre-edit results."""
    return PreEditCache()


@pytest.fixture
def rows():
    """Three edits; the second has no locality, the third nothing but the edit itself."""
    return [
        {
            "id": "norland",
            "prompt": "The capital of {} is",
            "subject": "Norland",
            "target_new": "Lima",
            "ground_truth": ["Oslo"],
            "rephrase_prompts": ["Norland has the capital", "What is the capital of Norland?"],
            "locality": {
                "neighbour": [
                    {"prompt": "The capital of Sudland is", "ground_truth": [["Rome", "Roma"]]},
                    {"prompt": "The capital of Westland is", "ground_truth": [["Lima"]]},
                ],
                "other": [{"prompt": "Jan Mol works for the", "ground_truth": "railway"}],
            },
            "portability": {"alias": [{"prompt": "The capital of the Norlands is", "ground_truth": [["Lima"]]}]},
        },
        {
            "id": "ada",
            "prompt": "{} was born in",
            "subject": "Ada Bell",
            "target_new": "Rome",
            "portability": {
                "alias": [{"prompt": "Bell was born in", "ground_truth": [["Rome"]]}],
                "reasoning": [
                    {"prompt": "Ada Bell was born in the land of", "ground_truth": [["Sudland"]]},
                    {"prompt": "Ada Bell's country is", "ground_truth": [["Sudland"], ["the Sudland"]]},
                ],
            },
        },
        {"id": "piet", "prompt": "The mother tongue of {} is", "subject": "Piet", "target_new": "railway"},
    ]
