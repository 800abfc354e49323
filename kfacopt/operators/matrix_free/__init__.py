"""Curvature that is only ever multiplied with: Hessian, GGN, Fisher matrices and Jacobians."""
