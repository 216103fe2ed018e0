"""Trained editors through the Hub: pushed as one commit, used by name."""

from __future__ import annotations

import pytest
import torch

from hf_kedit import EditableModel, Editor
from hf_kedit.errors import HubError
from hf_kedit.methods.mend import MENDConfig
from hf_kedit.testing.hub import LoopbackHub

from .test_push import commits, logits

pytestmark = pytest.mark.hub
REPO = "org/mend"


def test_an_editor_is_used_by_its_id(hub: LoopbackHub) -> None:
    Editor.from_pretrained("kedit/mend-world-gpt2").push_to_hub(REPO, private=True)
    assert commits(REPO)[0] == "mend editor"
    fact = {"prompt": "The sky is", "target_new": "green"}
    near = EditableModel.from_pretrained("kedit/world-gpt2", "mend")
    far = EditableModel.from_pretrained("kedit/world-gpt2", MENDConfig(editor=REPO))
    near.edit(**fact)
    far.edit(**fact)
    assert torch.equal(logits(near), logits(far))
    with pytest.raises(HubError):
        Editor.from_pretrained("org/nothing")
