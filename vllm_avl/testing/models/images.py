"""Images that need no file."""

import torch
from PIL import Image, ImageDraw

NUM_SHAPES = 12


def random_image(seed: int, width: int = 336, height: int = 336) -> Image.Image:
    """Returns an RGB image of coloured shapes on a gradient, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    corners = torch.randint(256, (3, 2, 2), generator=generator)
    image = Image.fromarray(_gradient(corners, width, height).numpy())
    draw = ImageDraw.Draw(image)
    for index in range(NUM_SHAPES):
        x, y = integers(width, 1)[0], integers(height, 1)[0]
        half_width, half_height = (8 + n for n in integers(min(width, height) // 5, 2))
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        red, green, blue = integers(256, 3)
        shape = draw.rectangle if index % 2 else draw.ellipse
        shape(box, fill=(red, green, blue))
    return image


def _gradient(corners: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Spread colours from the corners; in integers: floats depend on the threads."""
    right, below = torch.arange(width), torch.arange(height)[:, None]
    left, above = width - 1 - right, height - 1 - below
    weights = torch.stack((above * left, above * right, below * left, below * right))
    total = max(width - 1, 1) * max(height - 1, 1)
    mixed = torch.einsum("ck,khw->hwc", corners.flatten(1), weights) // total
    return mixed.to(torch.uint8)
