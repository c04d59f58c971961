"""Image and codebook metrics."""
