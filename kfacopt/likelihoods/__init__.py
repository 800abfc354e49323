"""A loss function read as a likelihood: where its curvature and its sampled gradients come from."""

from __future__ import annotations

from kfacopt.likelihoods.base import FisherType as FisherType
from kfacopt.likelihoods.base import KFACType as KFACType
from kfacopt.likelihoods.base import Likelihood as Likelihood
from kfacopt.likelihoods.base import LossTerms as LossTerms
from kfacopt.likelihoods.bernoulli import Bernoulli as Bernoulli
from kfacopt.likelihoods.categorical import Categorical as Categorical
from kfacopt.likelihoods.fisher import Curvature as Curvature
from kfacopt.likelihoods.fisher import Fisher as Fisher
from kfacopt.likelihoods.from_loss import likelihood_from as likelihood_from
from kfacopt.likelihoods.gaussian import Gaussian as Gaussian

__all__ = [
    "Bernoulli",
    "Categorical",
    "Curvature",
    "Fisher",
    "FisherType",
    "Gaussian",
    "KFACType",
    "Likelihood",
    "LossTerms",
    "likelihood_from",
]
