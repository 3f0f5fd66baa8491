"""Picture files of the kinds that are decoded in more than one way."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image

UPRIGHT = 1
ORIENTATIONS = range(1, 9)
# What a camera does to a picture that its file's orientation undoes.
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(upright: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    """Return a file that says how to turn it so that it is `upright`."""
    if orientation != UPRIGHT:
        upright = upright.transpose(TURNED[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return file_of(upright, kind, exif=exif)


def oddities(upright: Image.Image) -> dict[str, bytes]:
    """Return files of one picture whose colours are not plain RGB, by name."""
    grey = np.asarray(upright.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    few = upright.quantize(16)
    half = Image.fromarray(np.where(grey > 128, 255, 60).astype(np.uint8))
    clear = upright.copy()
    clear.putalpha(half)
    faded = upright.convert("L")
    faded.putalpha(half)
    return {
        "16 bits": file_of(deep),
        "palette": file_of(few),
        "palette with transparency": file_of(few, transparency=3),
        "translucent palette": file_of(few, transparency=bytes(range(0, 256, 16))),
        "CMYK": file_of(upright.convert("CMYK"), "JPEG", quality=95),
        "CMYK, no loss": file_of(upright.convert("CMYK"), "TIFF"),
        "grey": file_of(upright.convert("L")),
        "grey with alpha": file_of(faded),
        "alpha": file_of(clear),
        "one bit": file_of(upright.convert("1")),
        "one colour is transparent": file_of(upright, transparency=(0, 0, 0)),
        "moving": file_of(few, "GIF", save_all=True, append_images=[few.rotate(90)]),
        "bitmap": file_of(upright, "BMP"),
        "WebP": file_of(upright, "WEBP", lossless=True),
        "damaged EXIF": file_of(upright, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"),
        "odd orientation": file_of(upright, exif=_orientation(99)),
    }


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif
