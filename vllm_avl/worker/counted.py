"""Lets a step's counts travel with an output that is still on the device."""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_avl.messages import send_counts


class CountedOutput(AsyncModelRunnerOutput):
    """An asynchronous output, and the counts of its step."""

    def __init__(
        self, output: AsyncModelRunnerOutput, counts: dict[str, float]
    ) -> None:
        self._output = output
        self._counts = counts

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the output."""
        output = self._output.get_output()
        if self._counts:
            send_counts(output, self._counts)
        return output

    def get_kv_connector_output(self) -> Any:
        """Return what vLLM 0.33 salvages of a step that failed."""
        return self._output.get_kv_connector_output()
