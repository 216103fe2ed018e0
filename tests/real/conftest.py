"""The real models, where `make real` has put them; tests are skipped where it has not been run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_kedit import EditableModel, embedded
from hf_kedit.storage.files import cache_home
from tests.conftest import OUTSIDE

SMOLLM, ENCODER = "kedit/smollm2-135m", "kedit/minilm-l6"


@pytest.fixture(scope="package", autouse=True)
def models() -> Iterator[Path]:
    """The folder that the shell outside of the tests means; what is made anew goes to the tests' own folders."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OUTSIDE.items():
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
        home = cache_home()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDIT_HOME", str(home))
        for name in (SMOLLM, ENCODER):
            if not embedded.is_there(name):
                pytest.skip(f"{name} is not in {home}: run `make real`")
        yield home / "models"


@pytest.fixture(scope="package")
def loaded(models: Path) -> EditableModel:
    """One copy of the model for all tests; use `smollm`."""
    return EditableModel.from_pretrained(SMOLLM, "ft-m")


@pytest.fixture
def smollm(loaded: EditableModel) -> Iterator[EditableModel]:
    """The model without edits."""
    yield loaded
    loaded.rollback()
