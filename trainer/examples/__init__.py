"""Examples that are also the documentation's code: importable, typed and tested.

``charlm`` is what ``stagecast demo`` trains; ``python -m trainer.examples.digits`` trains a classifier in some seconds.
"""
