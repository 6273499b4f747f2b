"""What the build of MindSpore Serving recorded."""

__backend__ = "inflight"
__package_name__ = "mindspore_serving"
