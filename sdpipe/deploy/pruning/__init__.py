"""Smaller networks from one training: the order of the blocks, what remains, and the choice among them."""
