"""One attempt at a run, from opening its observers to its outcome."""
