"""Data sets: fetch, store, split, augment."""
