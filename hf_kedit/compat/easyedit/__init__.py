"""EasyEdit's names on top of this library: an existing script changes its import lines.

    from hf_kedit.compat.easyedit import BaseEditor, ROMEHyperParams   # instead of: from easyeditor import …

EasyEdit's module paths are here as well (``.models.ike``, ``.dataset``, ``.util.nethook`` …). Arguments, the layout of
the metrics and the three return values are EasyEdit's. The numbers are this library's: its methods, its protocols
(teacher forced), its reading of the hyperparameters. A name without a counterpart can be imported, and raises a
`NoCounterpartError` that says what to use instead as soon as something is done with it. docs/migrate.md lists the
differences.
"""

from __future__ import annotations

import sys
from typing import Any

from .editor import BaseEditor, BatchEditor, encode_ike_facts
from .hparams import HyperParams
from .measures import summary_metrics
from .names import ABSENT, HERE, MODULES, Door, Signpost, find
from .training import EditTrainer, convert_training

__all__ = ["BaseEditor", "BatchEditor", "EditTrainer", "HyperParams", "encode_ike_facts", "summary_metrics"]
__all__ += ["convert_training", *sorted(HERE.keys() - set(__all__))]


def __getattr__(name: str) -> Any:
    return find(name)


# Doors instead of files: EasyEdit spreads its names over more than a hundred modules, and scripts import them from
# wherever they happen to be. What Python finds in `sys.modules` it does not look for on the disk.
for _path in MODULES:
    _door = Door(f"{__name__}.{_path}", "One of EasyEdit's modules; see `hf_kedit.compat.easyedit`.")
    sys.modules[_door.__name__] = _door
    _parent, _, _last = _door.__name__.rpartition(".")
    if _last not in HERE and _last not in ABSENT:  # trainer.EditTrainer is a module and a class: the class is meant
        setattr(sys.modules[_parent], _last, _door)
sys.meta_path.append(Signpost(__name__))
