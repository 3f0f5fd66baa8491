"""The scheduler's side: plans, the block manager, the cache spec."""
