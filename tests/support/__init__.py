"""What the tests share: imported as ``support``, because pytest has ``tests`` on its path."""
