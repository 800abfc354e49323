"""Curvature backends: what an optimizer holds."""

from kfacopt.backends.base import CurvatureBackend as CurvatureBackend
from kfacopt.backends.base import LayerTensors as LayerTensors
from kfacopt.backends.base import Settings as Settings
from kfacopt.backends.ekfac import EKFACBackend as EKFACBackend
from kfacopt.backends.ekfac import ExactEKFACBackend as ExactEKFACBackend
from kfacopt.backends.gram import Gram as Gram
from kfacopt.backends.kfac import ExactKFACBackend as ExactKFACBackend
from kfacopt.backends.kfac import KFACBackend as KFACBackend
from kfacopt.backends.layerwise import LayerwiseBackend as LayerwiseBackend
from kfacopt.backends.matrix_free import CG as CG
from kfacopt.backends.solver import Problem as Problem
from kfacopt.backends.solver import Solved as Solved
from kfacopt.backends.solver import Solver as Solver
