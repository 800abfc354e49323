"""Second-order optimization for PyTorch: swap `AdamW(model.parameters())` for `EKFAC(model, loss_func)`."""

from kfacopt import operators as operators
from kfacopt import schedules as schedules
from kfacopt.backends import CG as CG
from kfacopt.backends import CurvatureBackend as CurvatureBackend
from kfacopt.backends import EKFACBackend as EKFACBackend
from kfacopt.backends import ExactEKFACBackend as ExactEKFACBackend
from kfacopt.backends import ExactKFACBackend as ExactKFACBackend
from kfacopt.backends import Gram as Gram
from kfacopt.backends import KFACBackend as KFACBackend
from kfacopt.backends import LayerTensors as LayerTensors
from kfacopt.backends import LayerwiseBackend as LayerwiseBackend
from kfacopt.backends import Problem as Problem
from kfacopt.backends import Settings as Settings
from kfacopt.backends import Solved as Solved
from kfacopt.backends import Solver as Solver
from kfacopt.blocks import Block as Block
from kfacopt.damping import LevenbergMarquardt as LevenbergMarquardt
from kfacopt.damping import RelativeDamping as RelativeDamping
from kfacopt.estimator import CurvatureOptions as CurvatureOptions
from kfacopt.layers import LayerHandler as LayerHandler
from kfacopt.layers import OneHot as OneHot
from kfacopt.layers import Rows as Rows
from kfacopt.layers import register_handler as register_handler
from kfacopt.layers.layer import Layer as Layer
from kfacopt.likelihoods import Bernoulli as Bernoulli
from kfacopt.likelihoods import Categorical as Categorical
from kfacopt.likelihoods import FisherType as FisherType
from kfacopt.likelihoods import Gaussian as Gaussian
from kfacopt.likelihoods import KFACType as KFACType
from kfacopt.likelihoods import Likelihood as Likelihood
from kfacopt.linalg.cg import RelativeProgress as RelativeProgress
from kfacopt.metric import Curvature as Curvature
from kfacopt.optim import EKFAC as EKFAC
from kfacopt.optim import KFAC as KFAC
from kfacopt.optim import ExactTrustRegion as ExactTrustRegion
from kfacopt.optim import GaussNewton as GaussNewton
from kfacopt.optim import GeodesicAcceleration as GeodesicAcceleration
from kfacopt.optim import GridLineSearch as GridLineSearch
from kfacopt.optim import NaturalGradient as NaturalGradient
from kfacopt.optim import QuadraticModel as QuadraticModel
from kfacopt.optim import SaddleFree as SaddleFree
from kfacopt.optim import SecondOrderOptimizer as SecondOrderOptimizer
from kfacopt.optim import TrustRegionNewton as TrustRegionNewton
from kfacopt.optim import TrustRegionStrategy as TrustRegionStrategy

__version__ = "0.1.0"
