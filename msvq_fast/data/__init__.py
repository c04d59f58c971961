"""Images in and pictures out."""
