"""What one replica does: requests in, images out."""
