"""The command ``stagecast``."""
