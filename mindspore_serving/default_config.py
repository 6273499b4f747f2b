"""Settings recorded by MindSpore Serving's build."""

__backend__ = "inflight"
__package_name__ = "mindspore_serving"
