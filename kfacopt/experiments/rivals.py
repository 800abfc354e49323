"""Factories for the optimizers that ours are compared with.

Each takes the network and, like ours, a `loss_func`, which it ignores, so that all of them can be exchanged in a
configuration.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW

from kfacopt.experiments.muon import MuonAdamW
from kfacopt.experiments.soap import SOAP


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(
    model: nn.Module,
    loss_func: Any = None,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool = True,
) -> AdamW:
    """`torch.optim.AdamW` over all trainable parameters of a network.

    Args:
        model: The network.
        loss_func: ignored.
        lr: Learning rate.
        betas: Decay of the running averages of the gradient and of its square.
        eps: Added to the root of the second.
        weight_decay: decoupled.
        fused: torch's fused kernel, which on a CPU takes a fifth of the time of the plain one. Turn it off to clip
            gradients under AMP, which Lightning refuses with a fused optimizer.

    >>> type(adamw(nn.Linear(2, 2))).__name__
    'AdamW'
    """
    # Lists come out of configuration files.
    beta1, beta2 = betas
    return AdamW(_trainable(model), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=fused)


def sgd(
    model: nn.Module,
    loss_func: Any = None,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    fused: bool = True,
) -> SGD:
    """`torch.optim.SGD` with momentum over all trainable parameters of a network.

    Args:
        model: The network.
        loss_func: ignored.
        lr: Learning rate.
        momentum: Decay of the summed gradients.
        nesterov: Whether to look ahead.
        weight_decay: Added to the gradient (not decoupled).
        fused: torch's fused kernel, which on a CPU takes a fifth of the time of the plain one. Turn it off to clip
            gradients under AMP, which Lightning refuses with a fused optimizer.

    >>> type(sgd(nn.Linear(2, 2))).__name__
    'SGD'
    """
    return SGD(_trainable(model), lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused)


def hidden_matrices(model: nn.Module, kernels: bool = False) -> list[nn.Parameter]:
    """The parameters that Muon is for: matrices, without embeddings and the last layer's.

    The last layer is the last module that has a matrix, in the order of registration.

    Args:
        model: The network.
        kernels: Whether kernels of convolutions count as matrices; torch's own Muon does not take them.

    >>> network = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    >>> [tuple(matrix.shape) for matrix in hidden_matrices(network)]
    [(4, 3)]
    """
    found: dict[nn.Parameter, None] = {}
    excluded: set[nn.Parameter] = set()
    last: list[nn.Parameter] = []
    for module in model.modules():
        # A head that shares the embedding's matrix is the last layer, too.
        matrices = [
            parameter
            for parameter in module.parameters(recurse=False)
            if (parameter.ndim == 2 or (kernels and parameter.ndim > 2)) and parameter.requires_grad
        ]
        found.update(dict.fromkeys(matrices))
        last = matrices or last
        if isinstance(module, nn.Embedding):
            excluded.update(matrices)
    excluded.update(last)
    return [parameter for parameter in found if parameter not in excluded]


def muon(
    model: nn.Module,
    loss_func: Any = None,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    adjust_lr_fn: str | None = None,
    adamw_lr: float = 1e-3,
    adamw_betas: tuple[float, float] = (0.9, 0.999),
    adamw_weight_decay: float = 0.0,
    fused: bool = True,
    kernels: bool = False,
) -> MuonAdamW:
    """Muon for a network's hidden matrices and AdamW for the rest, see `MuonAdamW`.

    Args:
        model: The network; see `hidden_matrices` for which parameters are Muon's.
        loss_func: ignored.
        lr: Muon's learning rate.
        momentum: Muon's momentum (Nesterov's).
        weight_decay: Muon's, decoupled.
        adjust_lr_fn: How Muon adapts the rate to a matrix' shape: `"original"` (None) or `"match_rms_adamw"`, with
            which AdamW's learning rates suit Muon too.
        adamw_lr: AdamW's learning rate.
        adamw_betas: AdamW's decays.
        adamw_weight_decay: AdamW's, decoupled.
        fused: AdamW's, see `adamw`.
        kernels: Whether Muon trains kernels of convolutions, too, as matrices with a row for each output channel.

    >>> optimizer = muon(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    >>> [(group["algorithm"], len(group["params"])) for group in optimizer.param_groups]
    [('muon', 1), ('adamw', 3)]
    """
    hidden = hidden_matrices(model, kernels)
    chosen = set(hidden)
    rest = [parameter for parameter in _trainable(model) if parameter not in chosen]
    beta1, beta2 = adamw_betas
    groups: list[dict[str, Any]] = [
        {
            "params": hidden,
            "algorithm": "muon",
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adjust_lr_fn": adjust_lr_fn,
        },
        {
            "params": rest,
            "algorithm": "adamw",
            "lr": adamw_lr,
            "betas": (beta1, beta2),
            "weight_decay": adamw_weight_decay,
            "fused": fused,
        },
    ]
    return MuonAdamW(group for group in groups if group["params"])


def soap(
    model: nn.Module,
    loss_func: Any = None,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    weight_decay: float = 0.0,
    frequency: int = 10,
) -> SOAP:
    """`SOAP` over all trainable parameters of a network, with its authors' settings.

    Args:
        model: The network.
        loss_func: ignored.
        lr: Learning rate.
        betas: Decay of the running averages of the gradient and of its square, the latter of Shampoo's statistics too.
        weight_decay: decoupled.
        frequency: Steps from one turn of the basis to the next.

    >>> type(soap(nn.Linear(2, 2))).__name__
    'SOAP'
    """
    beta1, beta2 = betas
    return SOAP(_trainable(model), lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, frequency=frequency)
