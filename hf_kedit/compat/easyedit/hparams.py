"""EasyEdit's hyperparameters as a script holds them: what a file says, as attributes that may be changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from ...config import read_mapping
from ...errors import ConfigError
from ...storage.files import named_path


class HyperParams(SimpleNamespace):
    """The content of an hparams file as attributes, which a script may change before it makes an editor.

    EasyEdit has a class per method. What a file is for, most files say themselves (``alg_name``, or ``alg`` where an
    editor is trained); of one that does not, the class says it.
    """

    METHOD: ClassVar[str | None] = None

    @classmethod
    def from_hparams(cls, path: str | Path) -> HyperParams:
        """Read a YAML or JSON file; ``.yaml`` may be left out.

        Raises:
            ConfigError: if it cannot be read.
        """
        file = named_path(path, "the hyperparameters", ConfigError)
        known = file.suffix in (".yaml", ".yml", ".json")
        content = read_mapping(file if known else file.with_name(file.name + ".yaml"))
        if cls.METHOD is not None and not {"alg_name", "alg"} & content.keys():
            content = {"alg_name": cls.METHOD, **content}
        return cls(**{str(key): value for key, value in content.items()})

    from_json = from_hparams

    def __getattr__(self, name: str) -> Any:
        """``base_hparams`` of SimIE, which EasyEdit reads from another file: its base method edits the same model."""
        if name == "base_hparams":
            return HyperParams(**{**vars(self), "alg_name": vars(self).get("base_method")})
        raise AttributeError(f"these hyperparameters have no {name!r}")


def values_of(hparams: HyperParams | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what hyperparameters say now."""
    return dict(hparams) if isinstance(hparams, Mapping) else dict(vars(hparams))
