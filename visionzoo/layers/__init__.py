"""Layers shared by the families, all on [B, H, W, C] maps."""
