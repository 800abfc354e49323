"""The optimizers: one file each, on the step in `base`."""

from kfacopt.optim.acceleration import GeodesicAcceleration as GeodesicAcceleration
from kfacopt.optim.base import SecondOrderOptimizer as SecondOrderOptimizer
from kfacopt.optim.ekfac import EKFAC as EKFAC
from kfacopt.optim.kfac import KFAC as KFAC
from kfacopt.optim.line_search import GridLineSearch as GridLineSearch
from kfacopt.optim.natural_gradient import NaturalGradient as NaturalGradient
from kfacopt.optim.newton import TrustRegionNewton as TrustRegionNewton
from kfacopt.optim.quadratic_model import QuadraticModel as QuadraticModel
from kfacopt.optim.subproblem import ExactTrustRegion as ExactTrustRegion
from kfacopt.optim.subproblem import GaussNewton as GaussNewton
from kfacopt.optim.subproblem import SaddleFree as SaddleFree
from kfacopt.optim.subproblem import TrustRegionStrategy as TrustRegionStrategy
