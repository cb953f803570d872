"""Downstream tasks: one file each, with its head, loss and metrics."""
