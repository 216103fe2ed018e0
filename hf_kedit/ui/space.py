"""The page as a folder that the Hub runs as a Space: app.py, requirements.txt, README.md."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError, shown
from ..storage.display import python_text
from ..storage.files import named_path, write_text
from ..version import __version__

GRADIO_VERSION = "6.31.0"
"""What a Space is started with; of the range of the extra ``demo``."""
_APP = '''"""Knowledge editing in the browser; made by `kedit ui --export-space`."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported

from hf_kedit import EditableModel
from hf_kedit.ui.layout import serve

if __name__ == "__main__":
    model = EditableModel.from_pretrained({model})
    # A Space is reached through its own proxy, so it listens at all addresses of its container.
    serve(model, host=os.environ.get("HOST", "0.0.0.0"), port=int(os.environ.get("PORT", "7860")))
'''
_README = """---
title: Knowledge editing
emoji: ✏️
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
license: apache-2.0
short_description: Change what a language model knows, see it, undo it
---

Change a fact in a language model, see what else changed, take it back. Every visitor has edits of their own; one model
is in memory.

Made by `kedit ui --export-space` with hf_kedit {version}. Push this folder to a Space with the SDK *gradio*. While
hf_kedit is not on PyPI, put its wheel into the folder and name the wheel in `requirements.txt`.
"""


def export_space(folder: str | Path, model: str) -> list[Path]:
    """Write the three files of a Space.

    Args:
        folder: made if needed; other files in it stay.
        model: name that the Space loads: an embedded model, or an id of the Hub.

    Returns:
        The files.

    Raises:
        ArtifactError: if the folder cannot be written.
        ConfigError: for a model in a folder of this machine, which a Space does not have.
    """
    if not isinstance(model, str) or not model.strip():
        raise ConfigError(f"a model is named by its id on the Hub, not {shown(model)}")
    if os.path.exists(os.path.expanduser(model)):
        raise ConfigError(
            f"{model!r} is a folder of this machine, which a Space does not see: push it, and name its id"
        )
    folder = named_path(folder, "the folder")
    texts = {
        "app.py": _APP.format(model=python_text(model)),
        "requirements.txt": f"hf_kedit[demo]=={__version__}\n",
        "README.md": _README.format(gradio=GRADIO_VERSION, version=__version__),
    }
    return [write_text(folder / name, text) for name, text in texts.items()]
