"""The hooks of callbacks and modules: their lanes, arguments and outputs."""
