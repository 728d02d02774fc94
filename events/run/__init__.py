"""A run as others see it: its folder, its events from a cursor on, commands to it."""
