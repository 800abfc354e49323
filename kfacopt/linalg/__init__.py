"""Linear algebra that knows no model: tensors in, tensors out."""
