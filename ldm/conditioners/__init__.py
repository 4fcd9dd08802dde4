"""Conditioners: modules that turn a batch (a dict) into a Cond. Each has forward(batch), null(n), width."""
