"""Where the base of linear operators was: it is in `kfacopt.linalg.operator`."""

from kfacopt.linalg.operator import IdentityLinearOperator as IdentityLinearOperator
from kfacopt.linalg.operator import LinearOperator as LinearOperator
from kfacopt.linalg.operator import Shapes as Shapes
from kfacopt.linalg.operator import TransferredLinearOperator as TransferredLinearOperator
