"""Short trainings that look for settings, and leave the module as it was."""
