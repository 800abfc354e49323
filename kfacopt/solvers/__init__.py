"""Solvers of a step's linear system, for `NaturalGradient`: one file each."""

from kfacopt.solvers.base import Problem as Problem
from kfacopt.solvers.base import Solved as Solved
from kfacopt.solvers.base import Solver as Solver
from kfacopt.solvers.conjugate_gradient import CG as CG
from kfacopt.solvers.gram import Gram as Gram
