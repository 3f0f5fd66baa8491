"""The parts of `soak.py`: load, probes, faults, and what is watched meanwhile."""
