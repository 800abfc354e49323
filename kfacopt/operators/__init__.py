"""Curvature as linear operators over a data set; the interface is that of curvlinops 3.0.1."""

from kfacopt.operators.base import IdentityLinearOperator as IdentityLinearOperator
from kfacopt.operators.base import LinearOperator as LinearOperator
from kfacopt.operators.chain import ChainGGN as ChainGGN
from kfacopt.operators.chain import ChainHessian as ChainHessian
from kfacopt.operators.chain import ChainStats as ChainStats
from kfacopt.operators.chain_parse import Residual as Residual
from kfacopt.operators.empirical_risk import CurvatureLinearOperator as CurvatureLinearOperator
from kfacopt.operators.fisher import EFLinearOperator as EFLinearOperator
from kfacopt.operators.fisher import FisherMCLinearOperator as FisherMCLinearOperator
from kfacopt.operators.ggn import GGNLinearOperator as GGNLinearOperator
from kfacopt.operators.hessian import HessianLinearOperator as HessianLinearOperator
from kfacopt.operators.jacobian import JacobianLinearOperator as JacobianLinearOperator
from kfacopt.operators.jacobian import TransposedJacobianLinearOperator as TransposedJacobianLinearOperator
