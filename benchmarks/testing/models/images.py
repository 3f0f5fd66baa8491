"""Images that need no file."""

from functools import cache

import torch
from PIL import Image, ImageDraw

NUM_SHAPES = 12


def random_image(seed: int, width: int = 336, height: int = 336) -> Image.Image:
    """Returns an RGB image of coloured shapes on a gradient, the same for a seed."""
    return _drawn(seed, width, height).copy()


# The gradient's last bits depend on how many threads compute it, and each thread of a
# process may have another number: what a process has drawn once stays as it is.
@cache
def _drawn(seed: int, width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    corners = torch.randint(256, (1, 3, 2, 2), generator=generator).float()
    gradient = torch.nn.functional.interpolate(
        corners, size=(height, width), mode="bilinear", align_corners=True
    )
    pixels = gradient[0].permute(1, 2, 0).to(torch.uint8).contiguous()
    image = Image.fromarray(pixels.numpy())
    draw = ImageDraw.Draw(image)
    for index in range(NUM_SHAPES):
        x, y = integers(width, 1)[0], integers(height, 1)[0]
        half_width, half_height = (8 + n for n in integers(min(width, height) // 5, 2))
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        red, green, blue = integers(256, 3)
        shape = draw.rectangle if index % 2 else draw.ellipse
        shape(box, fill=(red, green, blue))
    return image
