"""Conditioners: modules that turn a batch (a dict) into a Cond. See base.py for the contract."""
