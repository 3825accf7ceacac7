"""What the gateway tells about itself: `metrics` counts, `logging` writes lines."""
