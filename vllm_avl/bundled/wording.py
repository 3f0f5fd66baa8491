"""How a chat is written down: what stands around pictures, questions and answers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The pieces of a prompt; `{}` is what a piece is about.

    Training reads the pieces one by one, so a token may not reach over their borders.

    Attributes:
        first: Opens the first turn.
        image: A picture, by its number.
        question: A question, up to where its answer begins.
        answer: An answer with its end.
        again: Opens a further turn.
    """

    first: str
    image: str
    question: str
    answer: str
    again: str

    def prefix(self, num_images: int) -> str:
        """Returns what stands in front of the first question."""
        images = "".join(self.image.format(n + 1) for n in range(num_images))
        return f"{self.first}{images}"

    def prompt(
        self, text: str, num_images: int = 1, earlier: Sequence[tuple[str, str]] = ()
    ) -> str:
        """Returns the images, the turns before and the question.

        Args:
            text: The question.
            num_images: Images of the first turn.
            earlier: Questions and answers of the turns before this one.
        """
        turns = "".join(
            f"{self.question.format(q)}{self.answer.format(a)}{self.again}"
            for q, a in earlier
        )
        return f"{self.prefix(num_images)}{turns}{self.question.format(text)}"
