"""How layers become rows and matrices: a handler for each type, and where to register your own.

>>> from torch import nn
>>> type(handler_for(nn.Linear(3, 2))).__name__
'LinearHandler'
>>> handler_for(nn.PReLU()) is None
True
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kfacopt.layers.attention import MultiheadAttentionHandler, output_projection_handler
from kfacopt.layers.base import LayerHandler as LayerHandler
from kfacopt.layers.base import OneHot as OneHot
from kfacopt.layers.base import Rows as Rows
from kfacopt.layers.bilinear import BilinearHandler
from kfacopt.layers.check import check_handler as check_handler
from kfacopt.layers.computed import handler_of_computed
from kfacopt.layers.convolution import ConvolutionHandler
from kfacopt.layers.embedding import EmbeddingHandler
from kfacopt.layers.embedding_bag import EmbeddingBagHandler
from kfacopt.layers.linear import LinearHandler
from kfacopt.layers.normalization import (
    BatchNormHandler,
    GroupNormHandler,
    InstanceNormHandler,
    LayerNormHandler,
    RMSNormHandler,
)
from kfacopt.layers.own_forward import OwnForwardHandler, forward_is_searched
from kfacopt.layers.products import ProductsHandler as ProductsHandler
from kfacopt.layers.recurrent import RecurrentHandler
from kfacopt.layers.registry import HandlerRegistry, RegistrationHandle
from kfacopt.layers.transposed_convolution import TransposedConvolutionHandler
from kfacopt.layers.transposed_linear import TransposedLinearHandler as TransposedLinearHandler

# What a user registers is meant for every optimizer in the process, as torch's own registrations are (kl divergences,
# pytree nodes); hence the one registry of the module. Tests that need another make their own.
_REGISTRY = HandlerRegistry(
    {
        nn.Linear: LinearHandler(),
        nn.Bilinear: BilinearHandler(),
        nn.Conv1d: ConvolutionHandler(),
        nn.Conv2d: ConvolutionHandler(),
        nn.Conv3d: ConvolutionHandler(),
        nn.ConvTranspose1d: TransposedConvolutionHandler(),
        nn.ConvTranspose2d: TransposedConvolutionHandler(),
        nn.ConvTranspose3d: TransposedConvolutionHandler(),
        nn.Embedding: EmbeddingHandler(),
        nn.EmbeddingBag: EmbeddingBagHandler(),
        nn.LayerNorm: LayerNormHandler(),
        nn.RMSNorm: RMSNormHandler(),
        nn.BatchNorm1d: BatchNormHandler(),
        nn.BatchNorm2d: BatchNormHandler(),
        nn.BatchNorm3d: BatchNormHandler(),
        nn.GroupNorm: GroupNormHandler(),
        nn.InstanceNorm1d: InstanceNormHandler(),
        nn.InstanceNorm2d: InstanceNormHandler(),
        nn.InstanceNorm3d: InstanceNormHandler(),
        nn.RNN: RecurrentHandler(),
        nn.LSTM: RecurrentHandler(),
        nn.GRU: RecurrentHandler(),
        nn.RNNCell: RecurrentHandler(),
        nn.LSTMCell: RecurrentHandler(),
        nn.GRUCell: RecurrentHandler(),
        nn.MultiheadAttention: MultiheadAttentionHandler(LinearHandler()),
        NonDynamicallyQuantizableLinear: output_projection_handler(),
    },
    by_name={"transformers.pytorch_utils.Conv1D": TransposedLinearHandler()},
)


def handler_for(module: nn.Module) -> LayerHandler | None:
    """The handler of a layer: that of its type, or of an ancestor whose `forward` it keeps.

    None if nobody knows such layers. A handler may still refuse this very module: ask its `refusal`.
    """
    handler = _REGISTRY.lookup(module)
    if handler is None:
        return None
    found = handler_of_computed(module, handler)
    return OwnForwardHandler(_REGISTRY.lookup) if forward_is_searched(module, found) else found


def register_handler(module_type: type[nn.Module], handler: LayerHandler) -> RegistrationHandle:
    """Let `handler` treat layers of `module_type`, in place of any handler there is.

    Returns a handle whose `remove()` undoes it (or use it in a `with` statement). An optimizer asks for its handlers
    when it is made: register first.

    Raises:
        TypeError: If `module_type` is not a module class or `handler` not a `LayerHandler` instance.

    >>> class Doubled(nn.Embedding):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> handler_for(Doubled(3, 2)).refusal(Doubled(3, 2))
    'subclass of Embedding with a forward of its own: register a handler'
    """
    return _REGISTRY.register(module_type, handler)
