"""Holds a model against real frames: metrics, and the drift between two forms of one model."""
