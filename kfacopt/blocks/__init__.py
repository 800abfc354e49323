"""What approximates one layer's curvature: one file a block."""

from kfacopt.blocks.base import Block as Block
from kfacopt.blocks.diagonal import DiagonalBlock as DiagonalBlock
from kfacopt.blocks.eigen import CorrectedEigenBlock as CorrectedEigenBlock
from kfacopt.blocks.eigen import EigenBlock as EigenBlock
from kfacopt.blocks.kronecker import KroneckerBlock as KroneckerBlock
from kfacopt.blocks.outputs import OutputBlock as OutputBlock
from kfacopt.blocks.partial import PartialEigenBlock as PartialEigenBlock
from kfacopt.blocks.storage import Storage as Storage
