"""What runs in the engine core: plans, the block manager, the scheduler."""
