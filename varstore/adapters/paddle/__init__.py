"""PaddlePaddle: save and load layers, optimizers and nested state, load into existing ones, and a callback for `fit`.

Names are those of ``state_dict``. Besides them, parameters have names of Paddle's own, such as ``linear_0.w_0``: they
are kept in the attribute ``parameter_names``, because the state of an optimizer is named by them. Nothing is pickled.
"""

from varstore.adapters.paddle.callback import VarstoreCallback
from varstore.adapters.paddle.loading import load, load_into, save
from varstore.adapters.paddle.state import state_of

__all__ = ["VarstoreCallback", "load", "load_into", "save", "state_of"]
