"""The display of a run in the output of a notebook's cell, which the console becomes in a kernel."""
