"""Curvature as linear operators over a data set; the interface is that of curvlinops 3.0.1."""

from kfacopt.linalg.operator import IdentityLinearOperator as IdentityLinearOperator
from kfacopt.linalg.operator import LinearOperator as LinearOperator
from kfacopt.operators.chain.hessian import ChainGGN as ChainGGN
from kfacopt.operators.chain.hessian import ChainHessian as ChainHessian
from kfacopt.operators.chain.hessian import ChainStats as ChainStats
from kfacopt.operators.chain.parse import Residual as Residual
from kfacopt.operators.convergence import ConvergenceWarning as ConvergenceWarning
from kfacopt.operators.empirical_risk import CurvatureLinearOperator as CurvatureLinearOperator
from kfacopt.operators.estimators.boundaries import approximate_boundaries as approximate_boundaries
from kfacopt.operators.estimators.boundaries import approximate_boundaries_abs as approximate_boundaries_abs
from kfacopt.operators.estimators.diagonal import hutchinson_diag as hutchinson_diag
from kfacopt.operators.estimators.diagonal import xdiag as xdiag
from kfacopt.operators.estimators.norm import hutchinson_squared_fro as hutchinson_squared_fro
from kfacopt.operators.estimators.plots import plot_spectral_density as plot_spectral_density
from kfacopt.operators.estimators.spectrum import (
    LanczosApproximateLogSpectrumCached as LanczosApproximateLogSpectrumCached,
)
from kfacopt.operators.estimators.spectrum import LanczosApproximateSpectrumCached as LanczosApproximateSpectrumCached
from kfacopt.operators.estimators.spectrum import lanczos_approximate_log_spectrum as lanczos_approximate_log_spectrum
from kfacopt.operators.estimators.spectrum import lanczos_approximate_spectrum as lanczos_approximate_spectrum
from kfacopt.operators.estimators.trace import hutchinson_trace as hutchinson_trace
from kfacopt.operators.estimators.trace import hutchpp_trace as hutchpp_trace
from kfacopt.operators.estimators.trace import xtrace as xtrace
from kfacopt.operators.inverses import CGInverseLinearOperator as CGInverseLinearOperator
from kfacopt.operators.inverses import LSMRInverseLinearOperator as LSMRInverseLinearOperator
from kfacopt.operators.inverses import NeumannInverseLinearOperator as NeumannInverseLinearOperator
from kfacopt.operators.kronecker.ekfac import EKFACLinearOperator as EKFACLinearOperator
from kfacopt.operators.kronecker.kfac import KFACLinearOperator as KFACLinearOperator
from kfacopt.operators.kronecker.kfac_inverse import KFACInverseLinearOperator as KFACInverseLinearOperator
from kfacopt.operators.kronecker.pieces import extract_averaged_patches as extract_averaged_patches
from kfacopt.operators.kronecker.pieces import extract_averaged_patches_per_group as extract_averaged_patches_per_group
from kfacopt.operators.kronecker.pieces import extract_patches as extract_patches
from kfacopt.operators.kronecker.pieces import extract_patches_per_group as extract_patches_per_group
from kfacopt.operators.kronecker.pieces import loss_hessian_matrix_sqrt as loss_hessian_matrix_sqrt
from kfacopt.operators.matrix_free.fisher import EFLinearOperator as EFLinearOperator
from kfacopt.operators.matrix_free.fisher import FisherMCLinearOperator as FisherMCLinearOperator
from kfacopt.operators.matrix_free.ggn import GGNLinearOperator as GGNLinearOperator
from kfacopt.operators.matrix_free.hessian import HessianLinearOperator as HessianLinearOperator
from kfacopt.operators.matrix_free.jacobian import JacobianLinearOperator as JacobianLinearOperator
from kfacopt.operators.matrix_free.jacobian import TransposedJacobianLinearOperator as TransposedJacobianLinearOperator
from kfacopt.operators.submatrix import SubmatrixLinearOperator as SubmatrixLinearOperator
