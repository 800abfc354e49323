"""A loss function read as a likelihood: where its curvature and its sampled gradients come from."""

from __future__ import annotations

from kfacopt.likelihoods.any_loss import AnyLoss as AnyLoss
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
from kfacopt.likelihoods.huber import Huber as Huber
from kfacopt.likelihoods.laplace import Laplace as Laplace
from kfacopt.likelihoods.log_probabilities import KullbackLeibler as KullbackLeibler
from kfacopt.likelihoods.log_probabilities import LogCategorical as LogCategorical
from kfacopt.likelihoods.poisson import Poisson as Poisson
from kfacopt.likelihoods.probability import BernoulliProbability as BernoulliProbability

__all__ = [
    "AnyLoss",
    "Bernoulli",
    "BernoulliProbability",
    "Categorical",
    "Curvature",
    "Fisher",
    "FisherType",
    "Gaussian",
    "Huber",
    "KFACType",
    "KullbackLeibler",
    "Laplace",
    "Likelihood",
    "LogCategorical",
    "LossTerms",
    "Poisson",
    "likelihood_from",
]
