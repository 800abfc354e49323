"""The pieces that Kronecker factors are made of, as functions on tensors; signatures are those of curvlinops 3.0.1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfacopt.layers.patches import averaged_patches, patches
from kfacopt.likelihoods import Categorical, likelihood_from

Pair = tuple[int, int] | int


def loss_hessian_matrix_sqrt(output_one_datum: Tensor, target_one_datum: Tensor, loss_func: nn.Module) -> Tensor:
    """A square root S of a loss's Hessian with respect to one datum's output: `S Sᵀ = ∇²ℓ`.

    Args:
        output_one_datum: The prediction, `[1, C]`.
        target_one_datum: The target, of batch size one.
        loss_func: torch's `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss`, with any of their arguments. A mean is
            taken over the outputs, not over the (one) datum; the weighted mean of cross-entropy divides by nothing.

    Returns:
        S, `[C, C]`.

    Raises:
        ValueError: If the output is not `[1, C]`, or the target not of one datum.
        TypeError: If the loss is not supported.

    >>> import torch
    >>> loss_hessian_matrix_sqrt(torch.zeros(1, 2), torch.zeros(1, 2), nn.MSELoss(reduction="sum"))
    tensor([[1.4142, 0.0000],
            [0.0000, 1.4142]])
    """
    if output_one_datum.ndim != 2 or output_one_datum.shape[0] != 1:
        raise ValueError(f"output_one_datum must have the shape [1, C], got {list(output_one_datum.shape)}")
    if target_one_datum.ndim == 0 or target_one_datum.shape[0] != 1:
        raise ValueError(f"target_one_datum must have batch size 1, got the shape {list(target_one_datum.shape)}")
    likelihood = likelihood_from(loss_func)
    terms = likelihood.terms(output_one_datum.detach(), target=target_one_datum)
    if isinstance(likelihood, Categorical):  # whose own root has a column less
        probabilities = terms.parameters[0].softmax(-1)
        deviation = (probabilities * terms.scale[0]).sqrt()
        root = deviation.diag() - torch.outer(probabilities, deviation)
    else:
        root = likelihood.hessian_sqrt(terms)[:, 0].mT
    return root.to(output_one_datum.dtype)


def extract_patches(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Tensor:
    """The patches that a 2d convolution sees, averaged over channel groups.

    For the patches of every group apart, see `extract_patches_per_group`: their average belongs to no exact factor.

    Args:
        x: Input of the convolution, `[n, C_in, I1, I2]`.
        kernel_size: The convolution's, and so are the others; `"same"` padding may be unequal.

    Returns:
        `[n, O1 * O2, C_in / groups * K1 * K2]`.

    >>> import torch
    >>> extract_patches(torch.zeros(5, 4, 8, 8), 3, 1, "same", 1, 2).shape
    torch.Size([5, 64, 18])
    """
    return extract_patches_per_group(x, kernel_size, stride, padding, dilation, groups).mean(1)


def extract_patches_per_group(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Tensor:
    """The patches that every group of a 2d convolution sees, `[n, groups, O1 * O2, C_in / groups * K1 * K2]`.

    >>> import torch
    >>> extract_patches_per_group(torch.zeros(5, 4, 8, 8), 3, 1, "same", 1, 2).shape
    torch.Size([5, 2, 64, 18])
    """
    conv = _convolution(x, kernel_size, stride, padding, dilation, groups)
    return patches(conv, x, ("weight",)).movedim(0, 1)


def extract_averaged_patches(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Tensor:
    """The average patch of a 2d convolution over its output places and channel groups, without forming patches.

    Returns:
        `[n, C_in / groups * K1 * K2]`.

    >>> import torch
    >>> extract_averaged_patches(torch.ones(5, 4, 8, 8), 3, 1, 0, 1, 2)[0].unique()
    tensor([1.])
    """
    return extract_averaged_patches_per_group(x, kernel_size, stride, padding, dilation, groups).mean(1)


def extract_averaged_patches_per_group(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Tensor:
    """The average patch of every group over the output places, `[n, groups, C_in / groups * K1 * K2]`.

    >>> import torch
    >>> extract_averaged_patches_per_group(torch.ones(5, 4, 8, 8), 3, 1, 0, 1, 2).shape
    torch.Size([5, 2, 18])
    """
    conv = _convolution(x, kernel_size, stride, padding, dilation, groups)
    return averaged_patches(conv, x).squeeze(2).movedim(0, 1)


def _convolution(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> nn.Conv2d:
    if x.ndim != 4:
        raise ValueError(f"x must have the shape [n, C_in, I1, I2], got {list(x.shape)}")
    return nn.Conv2d(
        x.shape[1],
        groups,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=False,
        device="meta",
    )
