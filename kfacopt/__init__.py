"""Second-order optimization for PyTorch: swap `AdamW(model.parameters())` for `EKFAC(model, loss_func)`."""

from kfacopt import operators as operators
from kfacopt import schedules as schedules
from kfacopt.backends import CurvatureBackend as CurvatureBackend
from kfacopt.backends import EigenKFACBackend as EigenKFACBackend
from kfacopt.backends import EKFACBackend as EKFACBackend
from kfacopt.backends import FullEKFACBackend as FullEKFACBackend
from kfacopt.backends import KFACBackend as KFACBackend
from kfacopt.backends import LayerTensors as LayerTensors
from kfacopt.backends import LayerwiseBackend as LayerwiseBackend
from kfacopt.backends import OneSidedKFACBackend as OneSidedKFACBackend
from kfacopt.backends import Settings as Settings
from kfacopt.blocks import Block as Block
from kfacopt.checkpoints import save_checkpoint as save_checkpoint
from kfacopt.damping import LevenbergMarquardt as LevenbergMarquardt
from kfacopt.damping import RelativeDamping as RelativeDamping
from kfacopt.layers import LayerHandler as LayerHandler
from kfacopt.layers import OneHot as OneHot
from kfacopt.layers import Rows as Rows
from kfacopt.layers import register_handler as register_handler
from kfacopt.layers.layer import Layer as Layer
from kfacopt.likelihoods import Bernoulli as Bernoulli
from kfacopt.likelihoods import Categorical as Categorical
from kfacopt.likelihoods import Curvature as Curvature
from kfacopt.likelihoods import Fisher as Fisher
from kfacopt.likelihoods import FisherType as FisherType
from kfacopt.likelihoods import Gaussian as Gaussian
from kfacopt.likelihoods import KFACType as KFACType
from kfacopt.likelihoods import Likelihood as Likelihood
from kfacopt.linalg.cg import RelativeProgress as RelativeProgress
from kfacopt.optim import EKFAC as EKFAC
from kfacopt.optim import KFAC as KFAC
from kfacopt.optim import CapturingOptimizer as CapturingOptimizer
from kfacopt.optim import ClippedGradients as ClippedGradients
from kfacopt.optim import Direction as Direction
from kfacopt.optim import ExactTrustRegion as ExactTrustRegion
from kfacopt.optim import GaussNewton as GaussNewton
from kfacopt.optim import GeodesicAcceleration as GeodesicAcceleration
from kfacopt.optim import Grafted as Grafted
from kfacopt.optim import GridLineSearch as GridLineSearch
from kfacopt.optim import NaturalGradient as NaturalGradient
from kfacopt.optim import Preconditioned as Preconditioned
from kfacopt.optim import QuadraticModel as QuadraticModel
from kfacopt.optim import SaddleFree as SaddleFree
from kfacopt.optim import SecondOrderOptimizer as SecondOrderOptimizer
from kfacopt.optim import Spectral as Spectral
from kfacopt.optim import SpectralDescent as SpectralDescent
from kfacopt.optim import Step as Step
from kfacopt.optim import StepLength as StepLength
from kfacopt.optim import TrustRegion as TrustRegion
from kfacopt.optim import TrustRegionNewton as TrustRegionNewton
from kfacopt.optim import TrustRegionStrategy as TrustRegionStrategy
from kfacopt.optim import UnitGradients as UnitGradients
from kfacopt.optim import Updates as Updates
from kfacopt.optim import deprecated
from kfacopt.replicas import Sharding as Sharding
from kfacopt.run_report import report as report
from kfacopt.solvers import CG as CG
from kfacopt.solvers import Gram as Gram
from kfacopt.solvers import Problem as Problem
from kfacopt.solvers import Solved as Solved
from kfacopt.solvers import Solver as Solver

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    return globals()[deprecated.new_name(name)]
