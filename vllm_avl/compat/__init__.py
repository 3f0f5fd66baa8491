"""Where vLLM is met: registration, seams, patches, versions, its configuration."""
