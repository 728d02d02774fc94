"""The hooks of callbacks and modules: which runs on which lane, and what it gets."""
