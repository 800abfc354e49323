"""The exact Hessian of an `nn.Sequential`: products, damped inverse, inertia and determinant."""
