"""The packaged hyperparameter files of methods, for tests that read all of them."""

from __future__ import annotations

from pathlib import Path

from hf_kedit.config.hparams import TRAINING, hparams_root

ROOT = hparams_root()
assert ROOT is not None
FILES: list[Path] = sorted(p for p in ROOT.glob("*/*.yaml") if p.parent.name != TRAINING)
