"""What a deployed file costs in time, and what stands beside it."""
