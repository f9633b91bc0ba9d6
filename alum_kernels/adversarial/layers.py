"""Where the layers of a transformer are: the longest list of modules that lies in no other list."""

from torch import nn


def layer_list(model: nn.Module, *, decoder: bool = False) -> str | None:
    """Name of the list of layers, as in ``model.named_modules()``; None where there is none.

    Args:
        model: the model, unwrapped.
        decoder: of an encoder-decoder, the decoder's list, otherwise the encoder's.
    """
    side = set(model.modules())
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        side = set((model.get_decoder() if decoder else model.get_encoder()).modules())
    lists = {
        name: len(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.ModuleList) and len(module) and module in side
    }
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outermost, key=lists.__getitem__) if outermost else None
