"""What the plug-in counts, and how it reaches vLLM's /metrics.

Scheduler and workers count what each step adds; vLLM's statistics carry the sums to one
front end a step, which adds them to its Prometheus collectors. So they are right with
several API servers and engines, as vLLM's own are.
"""
