"""The only folder that touches vLLM internals: subclasses, patches, version checks."""
