"""The sizes of a small checkpoint."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ModelSize:
    """Sizes shared by all architectures; the `vision_` fields size the image tower.

    What decides the number of vision tokens per image is part of the architecture.
    """

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    intermediate_size: int = 512
    max_position_embeddings: int = 8192
    vision_hidden_size: int = 64
    vision_num_layers: int = 2
    vision_num_heads: int = 2
    vision_intermediate_size: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} must be at least 1"
                )
        self._check_multiple("num_heads", "num_kv_heads")
        self._check_multiple("vision_hidden_size", "vision_num_heads")

    def _check_multiple(self, name: str, divisor_name: str) -> None:
        value, divisor = getattr(self, name), getattr(self, divisor_name)
        if value % divisor:
            raise ValueError(
                f"{name}={value} must be a multiple of {divisor_name}={divisor}"
            )


TINY = ModelSize(
    hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_size=32
)
"""Of tests that ask much of the scheduler and nothing of the model."""
