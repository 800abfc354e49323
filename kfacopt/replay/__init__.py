"""A step's forwards run again: products with their curvature, and the change of the loss."""
