"""The training loop and its parts. All on the thread of the loop."""
