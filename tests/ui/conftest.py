"""One small model and its page for all tests of a file; what a test changes is in a session of its own."""

from __future__ import annotations

import pytest

from hf_kedit import EditableModel
from hf_kedit.ui.examples import Examples, examples_for
from hf_kedit.ui.visitors import Visitor, Visitors


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return EditableModel.from_pretrained("kedit/world-gpt2", "auto")


@pytest.fixture(scope="module")
def examples(model: EditableModel) -> Examples:
    return examples_for(model)


@pytest.fixture
def visitor(model: EditableModel) -> Visitor:
    return Visitors(model).enter(None)[1]
