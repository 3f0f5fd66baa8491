"""What `scheduler.offloading` wraps, and reads, of vLLM's OffloadingConnector."""

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    TransferJobStatus,
)

from vllm_avl.compat.seam import Seam

SEAMS: tuple[Seam, ...] = (
    Seam(
        OffloadingConnectorScheduler,
        "get_num_new_matched_tokens",
        ("self", "request", "num_computed_tokens", "max_num_new_tokens"),
        "a load leaves the rows that score to compute",
    ),
    Seam(
        OffloadingConnectorScheduler,
        "_calc_num_offloadable_tokens",
        ("self", "req_status", "num_computed_tokens"),
        "answers that saw less than all are not stored, nor what others have by now",
    ),
    Seam(
        OffloadingConnectorScheduler,
        "_reachable_store_block_mask",
        (
            "self",
            "group_config",
            "start_chunk_idx",
            "end_chunk_idx",
            "final_segment_end_chunk_idx",
            "reachable_boundaries",
        ),
        "sliding windows are stored where an adaptive request's load ends",
    ),
    Seam(
        OffloadingConnectorScheduler,
        "build_connector_meta",
        ("self", "scheduler_output"),
        "a copy is waited for when a running request's block gets another owner",
    ),
    Seam(
        TransferJobStatus,
        "__init__",
        (
            "self",
            "req_id",
            "pending_count",
            "keys",
            "is_store",
            "deferred_fence_block_ids",
            "fenced_block_ids",
        ),
        "which blocks a job minds, and from when on",
        also=(
            (
                "self",
                "req_id",
                "pending_count",
                "keys",
                "is_store",
                "is_sync_load",
                "deferred_fence_block_ids",
                "fenced_block_ids",
            ),  # 0.33
        ),
    ),
)
