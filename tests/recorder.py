"""A worker extension that remembers which rows each eviction moved."""

from vllm_avl.backend import compaction

SEEN = []
_original = compaction.moves


def _moves(plan, vision_rows, scores):
    source, target = _original(plan, vision_rows, scores)
    SEEN.append((source.tolist(), target.tolist()))
    return source, target


compaction.moves = _moves


class Recorder:
    def take_evictions(self):
        seen = list(SEEN)
        SEEN.clear()
        return seen
