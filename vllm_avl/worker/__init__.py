"""What runs in a worker: a step's view of the blocks, what layers do, back ends."""
