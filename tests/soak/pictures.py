"""Picture files that cannot be read, or would take all memory."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping

from benchmarks.testing import models
from vllm_avl.demo.server import png

SIGNATURE = b"\x89PNG\r\n\x1a\n"
AFTER_HEADER = len(SIGNATURE) + 25
TEXT_BYTES = 200 << 20


def broken() -> Mapping[str, tuple[bytes, str]]:
    """Return files by name, each with what its refusal must say."""
    whole = png(models.random_image(1))
    damaged = whole[: AFTER_HEADER - 4] + bytes(4) + whole[AFTER_HEADER:]
    unreadable = "Failed to load image: "
    identify = unreadable + "cannot identify image file"
    return {
        "truncated PNG": (whole[: len(whole) // 2], unreadable + "image file is trunc"),
        "truncated JPEG": (_jpeg()[:3000], unreadable + "image file is truncated"),
        "damaged PNG header": (damaged, identify),
        "PNG header alone": (whole[:AFTER_HEADER], unreadable),
        "no picture": (b"not a picture", identify),
        "empty file": (b"", identify),
        # Over the server's limit, under Pillow's.
        "bomb, 64 megapixels": (_flat_png(8000), "exceed the maximum of 50000000 pix"),
        # Over Pillow's own limit too.
        "bomb, 400 megapixels": (_flat_png(20000), "decompression bomb|exceed the max"),
        "text bomb, 200 MiB": (_text_bomb(whole), "Decompressed data too large"),
    }


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    models.random_image(1).save(buffer, "JPEG")
    return buffer.getvalue()


def _flat_png(side: int) -> bytes:
    """Return a black-and-white PNG of side x side pixels in a few kilobytes."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = 100
    strip = bytes(rows * (1 + -(-side // 8)))
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(strip) for _ in range(side // rows))
    content = data + packer.flush()
    chunks = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(name, content) for name, content in chunks)


def _text_bomb(whole: bytes) -> bytes:
    """Return `whole` with a comment that unpacks to `TEXT_BYTES`."""
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(TEXT_BYTES), 9))
    return whole[:AFTER_HEADER] + comment + whole[AFTER_HEADER:]


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    )
