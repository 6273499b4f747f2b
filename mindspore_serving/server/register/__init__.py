"""MindSpore Serving's registration functions, which a servable_config.py imports."""

from mindspore_serving.server.register import method, model, stage_function, utils
from mindspore_serving.server.register.method import *  # noqa: F403
from mindspore_serving.server.register.model import *  # noqa: F403

__all__ = ["method", "model", "stage_function", "utils"]
__all__ += method.__all__
__all__ += model.__all__
