"""Curvature as linear operators over a data set; the interface is that of curvlinops 3.0.1."""

from kfacopt.operators.base import IdentityLinearOperator as IdentityLinearOperator
from kfacopt.operators.base import LinearOperator as LinearOperator
from kfacopt.operators.boundaries import approximate_boundaries as approximate_boundaries
from kfacopt.operators.boundaries import approximate_boundaries_abs as approximate_boundaries_abs
from kfacopt.operators.convergence import ConvergenceWarning as ConvergenceWarning
from kfacopt.operators.diagonal import hutchinson_diag as hutchinson_diag
from kfacopt.operators.diagonal import xdiag as xdiag
from kfacopt.operators.inverse import CGInverseLinearOperator as CGInverseLinearOperator
from kfacopt.operators.inverse import LSMRInverseLinearOperator as LSMRInverseLinearOperator
from kfacopt.operators.inverse import NeumannInverseLinearOperator as NeumannInverseLinearOperator
from kfacopt.operators.norm import hutchinson_squared_fro as hutchinson_squared_fro
from kfacopt.operators.plots import plot_spectral_density as plot_spectral_density
from kfacopt.operators.spectrum import LanczosApproximateLogSpectrumCached as LanczosApproximateLogSpectrumCached
from kfacopt.operators.spectrum import LanczosApproximateSpectrumCached as LanczosApproximateSpectrumCached
from kfacopt.operators.spectrum import lanczos_approximate_log_spectrum as lanczos_approximate_log_spectrum
from kfacopt.operators.spectrum import lanczos_approximate_spectrum as lanczos_approximate_spectrum
from kfacopt.operators.submatrix import SubmatrixLinearOperator as SubmatrixLinearOperator
from kfacopt.operators.trace import hutchinson_trace as hutchinson_trace
from kfacopt.operators.trace import hutchpp_trace as hutchpp_trace
from kfacopt.operators.trace import xtrace as xtrace
