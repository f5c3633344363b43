"""The training loop and what it needs: draws, schedule, checkpoints, tracking."""
