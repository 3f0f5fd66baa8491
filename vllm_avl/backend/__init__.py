"""The workers' side: what a step reads, and which rows stay."""
