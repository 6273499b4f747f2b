"""What a rank finds wrong in a row that joins: the row fails, the step and its neighbours do not."""

from __future__ import annotations

from inflight.contract import AdmittedRow, Sampling, StepPlan, unknown_token


def sound_plan(plan: StepPlan, vocab_size: int) -> tuple[StepPlan, dict[int, str]]:
    """The plan with what cannot be computed replaced, and what was wrong by row.

    Such a row is computed all the same, with token 0 in place of those that the model does not know: the scheduler may
    have published the blocks before them already, and others rely on what is in there. Depends on the plan alone, so
    that all ranks do the same.

    Args:
        vocab_size: rows of the embedding and columns of the logits.
    """
    failed: dict[int, str] = {}
    prefill: list[AdmittedRow] = []
    for admission in plan.prefill:
        text = None if admission.token_ids is None else _fault(admission, vocab_size)
        if text is not None:
            failed[admission.id] = text
            admission = _repaired(admission, vocab_size)
        prefill.append(admission)
    if failed:
        plan = StepPlan(plan.step, plan.filter, prefill, plan.grants, plan.hold, plan.masks)
    return plan, failed


def _fault(admission: AdmittedRow, vocab_size: int) -> str | None:
    assert admission.token_ids is not None
    assert admission.sampling is not None
    token = unknown_token(admission.token_ids, vocab_size)
    if token is not None:
        return f"token {token} does not exist, the model's tokens are 0 to {vocab_size - 1}"
    return admission.sampling.fault(vocab_size)


def _repaired(admission: AdmittedRow, vocab_size: int) -> AdmittedRow:
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
        admission.adapter,
    )
