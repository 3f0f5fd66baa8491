"""Keeps a picture as it was sent, and shows it as vLLM showed it to the model.

vLLM turns a picture upright and makes it RGB before anything measures it. A browser
turns and mixes colours by rules of its own.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import ExifTags, Image
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO

AS_SENT = ("PNG", "JPEG", "WEBP")
"""Formats that every browser shows."""
SHOWN_MODES = ("RGB", "RGBA", "L")
JPEG_QUALITY = 95


@dataclass(frozen=True)
class SentPicture:
    """A picture's file, and how vLLM read it."""

    file: bytes
    settings: Mapping[str, Any] | None
    """Of `ImageMediaIO`; None where the colours stayed as they were."""

    @classmethod
    def of(cls, item: Any) -> SentPicture | None:
        """Take what vLLM loaded; None where that is no picture's file."""
        if isinstance(item, MediaWithBytes) and isinstance(item.media, Image.Image):
            return cls(item.original_bytes, item.io_config)
        return None

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return len(self.file)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as the model saw it, in pixels."""
        return self._shown[0]

    @property
    def url(self) -> str:
        """A data URL; the file itself where a browser shows it as the model saw it."""
        return self._shown[1]

    @cached_property
    def _shown(self) -> tuple[tuple[int, int], str]:
        sent = open_image(io.BytesIO(self.file))
        is_upright = sent.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if self.settings is None and is_upright and sent.format in AS_SENT:
            return sent.size, _url(sent.format, self.file)
        settings = self.settings or {"image_mode": None}
        seen = ImageMediaIO(**settings).load_bytes(self.file).media
        # A photograph would be many times as large without loss.
        kind = "JPEG" if sent.format in ("JPEG", "MPO") else "PNG"
        if seen.mode not in SHOWN_MODES or kind == "JPEG":
            seen = seen.convert("RGB")
        file = io.BytesIO()
        seen.save(file, kind, quality=JPEG_QUALITY, subsampling=0)
        return seen.size, _url(kind, file.getvalue())


def _url(kind: str, file: bytes) -> str:
    encoded = base64.b64encode(file).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"
