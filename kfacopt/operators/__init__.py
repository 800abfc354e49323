"""Curvature as linear operators over a data set; the interface is that of curvlinops 3.0.1."""

from kfacopt.operators.base import IdentityLinearOperator as IdentityLinearOperator
from kfacopt.operators.base import LinearOperator as LinearOperator
from kfacopt.operators.ekfac import EKFACLinearOperator as EKFACLinearOperator
from kfacopt.operators.empirical_risk import CurvatureLinearOperator as CurvatureLinearOperator
from kfacopt.operators.fisher import EFLinearOperator as EFLinearOperator
from kfacopt.operators.fisher import FisherMCLinearOperator as FisherMCLinearOperator
from kfacopt.operators.ggn import GGNLinearOperator as GGNLinearOperator
from kfacopt.operators.hessian import HessianLinearOperator as HessianLinearOperator
from kfacopt.operators.jacobian import JacobianLinearOperator as JacobianLinearOperator
from kfacopt.operators.jacobian import TransposedJacobianLinearOperator as TransposedJacobianLinearOperator
from kfacopt.operators.kfac import KFACLinearOperator as KFACLinearOperator
from kfacopt.operators.kfac_inverse import KFACInverseLinearOperator as KFACInverseLinearOperator
