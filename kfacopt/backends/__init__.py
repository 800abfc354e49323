"""Curvature backends: what an optimizer holds."""

from kfacopt.backends.base import CurvatureBackend as CurvatureBackend
from kfacopt.backends.base import LayerTensors as LayerTensors
from kfacopt.backends.base import Settings as Settings
from kfacopt.backends.ekfac import EKFACBackend as EKFACBackend
from kfacopt.backends.ekfac import FullEKFACBackend as FullEKFACBackend
from kfacopt.backends.kfac import EigenKFACBackend as EigenKFACBackend
from kfacopt.backends.kfac import KFACBackend as KFACBackend
from kfacopt.backends.layerwise import LayerwiseBackend as LayerwiseBackend
