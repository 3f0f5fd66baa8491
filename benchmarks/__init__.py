"""What vllm-avl costs and brings, measured against stock vLLM of the same version."""
