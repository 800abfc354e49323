"""A step is two decisions: a `Direction` and a `StepLength`; both read one `Step`. One file each."""

from kfacopt.optim.step.base import Direction as Direction
from kfacopt.optim.step.base import Step as Step
from kfacopt.optim.step.base import StepLength as StepLength
from kfacopt.optim.step.base import Updates as Updates
from kfacopt.optim.step.grafted import Grafted as Grafted
from kfacopt.optim.step.line_search import GridLineSearch as GridLineSearch
from kfacopt.optim.step.preconditioned import Preconditioned as Preconditioned
from kfacopt.optim.step.quadratic_model import QuadraticModel as QuadraticModel
from kfacopt.optim.step.rescaled import ClippedGradients as ClippedGradients
from kfacopt.optim.step.rescaled import UnitGradients as UnitGradients
from kfacopt.optim.step.spectral import Spectral as Spectral
from kfacopt.optim.step.trust_region import TrustRegion as TrustRegion
