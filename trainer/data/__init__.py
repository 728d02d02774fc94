"""Batches, dataloaders, tensors and random generators."""
