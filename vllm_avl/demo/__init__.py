"""`python -m vllm_avl.demo`: a server, a question about a picture, what was kept."""
