"""What happens beside training steps: checkpoints, progress, metrics, pictures, and stopping when asked to."""
