"""Curvature as one Kronecker product a layer: KFAC and EKFAC over a data set, and their inverse."""
