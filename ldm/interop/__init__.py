"""Other people's checkpoints: their names of weights, their configs, read and written. No model file knows of them."""
