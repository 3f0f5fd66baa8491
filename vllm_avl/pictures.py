"""A picture as vLLM hands it to the model: upright, and RGB.

By hand, because drawings for notebooks need no vLLM; a test compares the two.
"""

from __future__ import annotations

import struct
from contextlib import suppress

from PIL import Image, ImageOps

# Of Pillow, at orientations that are not written as they should be.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, SyntaxError, struct.error)
TRANSLUCENT = ("RGBA", "LA", "PA")


def as_seen(picture: Image.Image) -> Image.Image:
    """Turn a picture as its file says, and put what is translucent on white.

    Raises:
        OSError: the file is damaged.
    """
    with suppress(*UNREADABLE):
        picture = ImageOps.exif_transpose(picture)
    picture.load()
    if picture.mode == "RGB":
        return picture
    if picture.mode not in TRANSLUCENT and "transparency" not in picture.info:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    seen = Image.new("RGB", layer.size, "white")
    seen.paste(layer, mask=layer.getchannel("A"))
    return seen
