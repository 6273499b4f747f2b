"""Checks of the rows that join a batch. A wrong row fails alone; the step and the other rows go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from inflight.contract import AdmittedRow, Sampling, StepPlan, unknown_token

ROW = 4
"""Bytes of a float32, of which an image's rows consist."""


class Images(NamedTuple):
    """How a model reads images: `image_width` and `image_layers` of `inflight.models.CausalLM`."""

    width: int
    layers: int


TEXT_ONLY = Images(0, 0)


def checked_plan(
    plan: StepPlan, vocab_size: int, images: Images = TEXT_ONLY, adapters: Sequence[int] = ()
) -> tuple[StepPlan, dict[int, str]]:
    """Replaces unknown tokens and wrong parameters of a plan; returns the new plan and the errors of rows, by id.

    A wrong row is still computed, with token 0 in place of tokens that the model does not know and without images whose
    spans are wrong: the scheduler may have published its blocks to the prefix cache, and other rows may read them. The
    result depends on the plan alone, so that all ranks get the same.

    Args:
        vocab_size: rows of the embedding and columns of the logits.
        images: how the model reads them.
        adapters: numbers of those that are loaded.
    """
    failed: dict[int, str] = {}
    prefill: list[AdmittedRow] = []
    for admission in plan.prefill:
        text = None if admission.token_ids is None else _fault(admission, vocab_size, images, adapters)
        if text is not None:
            failed[admission.id] = text
            admission = _repaired(admission, vocab_size, images, adapters)
        prefill.append(admission)
    if failed:
        plan = StepPlan(plan.step, plan.filter, prefill, plan.grants, plan.hold, plan.masks, plan.saves, plan.drafts)
    return plan, failed


def _fault(admission: AdmittedRow, vocab_size: int, images: Images, adapters: Sequence[int]) -> str | None:
    assert admission.token_ids is not None
    assert admission.sampling is not None
    token = unknown_token(admission.token_ids, vocab_size)
    if token is not None:
        return f"token {token} does not exist, the model's tokens are 0 to {vocab_size - 1}"
    if admission.adapter and admission.adapter not in adapters:
        return "its adapter is not loaded any more"
    return admission.sampling.fault(vocab_size) or _media_fault(admission, images)


def _media_fault(admission: AdmittedRow, images: Images) -> str | None:
    """What is wrong with the spans of a row's images; None: nothing."""
    end, width = 0, ROW * images.width
    if admission.media and not width:
        return "the model reads text only"
    for span in admission.media:
        if span.start < end or span.count < 1 or span.start + span.count > admission.num_prompt:
            return (
                f"the image at tokens {span.start} to {span.start + span.count - 1} overlaps another one or lies "
                f"outside the prompt of {admission.num_prompt} tokens"
            )
        end = span.start + span.count
        if span.grid is not None and (min(span.grid) < 1 or span.grid[0] * span.grid[1] != span.count):
            return f"the image at tokens {span.start} to {end - 1} has a grid of {span.grid[0]} by {span.grid[1]}"
        if not span.rows and not span.added and end <= admission.num_cached:
            continue  # its keys are in the cache
        if any(len(rows) != span.count * width for rows in (span.rows, *span.added)):
            return (
                f"the image at tokens {span.start} to {end - 1} has {len(span.rows)} bytes for {span.count} tokens of "
                f"{width}"
            )
        if len(span.added) not in (0, images.layers):
            return f"the image at tokens {span.start} to {end - 1} has rows for {len(span.added)} layers"
    return None


def _repaired(admission: AdmittedRow, vocab_size: int, images: Images, adapters: Sequence[int]) -> AdmittedRow:
    known = [token if 0 <= token < vocab_size else 0 for token in admission.token_ids or ()]
    sampling = admission.sampling
    if sampling is None or sampling.fault(vocab_size) is not None:
        sampling = Sampling()
    return AdmittedRow(
        admission.id,
        admission.chunk,
        admission.blocks,
        known,
        admission.num_prompt,
        admission.num_cached,
        sampling,
        admission.adapter if admission.adapter in adapters else 0,
        [] if _media_fault(admission, images) is not None else admission.media,
        admission.state,
        admission.restore,
    )
