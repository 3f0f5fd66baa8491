"""A worker extension that remembers which rows were moved."""

from vllm_avl.backend import layer

SEEN = []
_original = layer.rearrange


def _rearrange(rows, labels, start, core_start, **options):
    of_prompt = rows.start == 0
    found = _original(rows, labels, start, core_start, **options)
    pairs = [(moves.source.tolist(), moves.target.tolist()) for moves in found]
    SEEN.append((of_prompt, pairs))
    return found


layer.rearrange = _rearrange


class Recorder:
    def take_moves(self):
        seen = list(SEEN)
        SEEN.clear()
        return seen
