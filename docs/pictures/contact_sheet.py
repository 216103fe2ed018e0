"""Draw docs/pictures/world_pictures.png: some of what the picture world shows, each line with one kind.

    python docs/pictures/contact_sheet.py

Of portraits the plain drawing stands beside two drawn with a seed; below them all flags, and groups of shapes.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from hf_kedit.data.picture_drawing import contact_sheet
from hf_kedit.data.picture_world import get_picture_world

COLUMNS, SCALE = 12, 2


def main() -> None:
    """Write the picture."""
    scenes = get_picture_world().scenes
    pictures = [scene.draw(seed) for scene in scenes["portrait"][:8] for seed in (None, 1, 2)]
    pictures += [scene.draw(i) for i, scene in enumerate(scenes["flag"])]
    pictures += [scene.draw(i) for i, scene in enumerate(scenes["shapes"][: 5 * COLUMNS - len(pictures)])]
    sheet = Image.fromarray(contact_sheet(pictures, COLUMNS))
    sheet = sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.NEAREST)
    sheet.quantize(256).save(Path(__file__).parent / "world_pictures.png", optimize=True)


if __name__ == "__main__":
    main()
