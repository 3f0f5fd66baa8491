"""How the bundled model is trained, written out, and scored."""
