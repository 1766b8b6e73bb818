"""Makes CLIP checkpoints from images and captions, or images and labels (PyTorch, Lightning)."""
