"""The optimizers: one file each, on the lifecycle in `capturing`; what a step is made of is in `step`."""

from kfacopt.optim.capturing import CapturingOptimizer as CapturingOptimizer
from kfacopt.optim.ekfac import EKFAC as EKFAC
from kfacopt.optim.kfac import KFAC as KFAC
from kfacopt.optim.natural_gradient import NaturalGradient as NaturalGradient
from kfacopt.optim.newton import TrustRegionNewton as TrustRegionNewton
from kfacopt.optim.second_order import SecondOrderOptimizer as SecondOrderOptimizer
from kfacopt.optim.spectral_descent import SpectralDescent as SpectralDescent
from kfacopt.optim.step import ClippedGradients as ClippedGradients
from kfacopt.optim.step import Direction as Direction
from kfacopt.optim.step import Grafted as Grafted
from kfacopt.optim.step import GridLineSearch as GridLineSearch
from kfacopt.optim.step import Preconditioned as Preconditioned
from kfacopt.optim.step import QuadraticModel as QuadraticModel
from kfacopt.optim.step import Spectral as Spectral
from kfacopt.optim.step import Step as Step
from kfacopt.optim.step import StepLength as StepLength
from kfacopt.optim.step import TrustRegion as TrustRegion
from kfacopt.optim.step import UnitGradients as UnitGradients
from kfacopt.optim.step import Updates as Updates
from kfacopt.optim.step.acceleration import GeodesicAcceleration as GeodesicAcceleration
from kfacopt.optim.subproblem import ExactTrustRegion as ExactTrustRegion
from kfacopt.optim.subproblem import GaussNewton as GaussNewton
from kfacopt.optim.subproblem import SaddleFree as SaddleFree
from kfacopt.optim.subproblem import TrustRegionStrategy as TrustRegionStrategy
