"""The page in the browser: ``kedit ui``. Needs Gradio (the extra ``demo``).

What the buttons do are plain functions: `probing`, `changing`, `sharing`, with `examples` and `settings` to begin
with, for `visitors` that each have edits of their own. How it looks is text: `markup`, `views`. `layout` is the page,
the one file that knows Gradio, and `space` a folder for the Hub.
"""

from __future__ import annotations

import os

# Read by Gradio and by the Hub's client when they are imported: nobody is told that somebody uses this page.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
