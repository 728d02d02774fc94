"""Examples for the documentation: importable, typed and tested.

``stagecast demo`` trains ``charlm``; ``python -m trainer.examples.digits`` trains a classifier in a few seconds.
``find_settings`` looks for a batch size and a learning rate first. ``gan`` and ``mean_teacher`` show manual
optimization, ``service`` runs in a web service. ``slurm.sh`` and ``kubernetes.yaml`` start a script on several hosts.
"""
