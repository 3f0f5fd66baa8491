"""A soak of a server: load, probes, faults, and what is watched meanwhile."""
