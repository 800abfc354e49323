"""Traces, diagonals, norms and spectra of an operator that is only multiplied with."""
