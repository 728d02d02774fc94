"""The bus: the loop publishes without waiting, observers receive in the event loop."""
