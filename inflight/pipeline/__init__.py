"""Runs the stages of a servable's methods inside a worker."""

from inflight.pipeline.batcher import BatchedModel
from inflight.pipeline.job import Job, Submission
from inflight.pipeline.pipeline import LocalModel, ModelPort, Pipeline
from inflight.pipeline.trial import Finding, examine

__all__ = ["BatchedModel", "Finding", "Job", "LocalModel", "ModelPort", "Pipeline", "Submission", "examine"]
