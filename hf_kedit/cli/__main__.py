"""``python -m hf_kedit.cli``: the console script without its installation, for launchers."""

from __future__ import annotations

from . import main

main()
