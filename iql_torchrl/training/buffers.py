"""Which replay buffers a training step can draw from."""

from __future__ import annotations

from collections.abc import Sequence

from torchrl.data import RandomSampler, ReplayBuffer, SamplerWithoutReplacement

from iql_torchrl.objectives import IQLLoss


def check_buffers(buffers: Sequence[ReplayBuffer], losses: int) -> None:
    """Refuse buffers whose batches a step cannot draw by itself, or that do not belong together.

    Raises:
        ValueError: another number than of the losses, no ``batch_size``, or one larger than the content, different
            data, a sampler that is not uniform, or passes whose last batch is smaller.
    """
    if len(buffers) != losses:
        raise ValueError(f"{losses} losses need as many buffers, one each; got {len(buffers)}.")
    for buffer in buffers:
        if buffer.batch_size is None:
            raise ValueError("the replay buffer has no batch_size; give it one when building it.")
        if len(buffer) < buffer.batch_size:
            raise ValueError(f"batch_size is {buffer.batch_size} but the buffer holds only {len(buffer)} transitions.")
        if (len(buffer), buffer.batch_size) != (len(buffers[0]), buffers[0].batch_size):
            raise ValueError("all buffers must hold the same data and have the same batch_size.")
        _refuse_unsuited_sampler(buffer)


def refuse_undivided(loss: IQLLoss, buffers: Sequence[ReplayBuffer]) -> None:
    """Refuse what several processes, which average the means over their shares of a batch, would not make the same of.

    Raises:
        ValueError: a loss that is no plain mean over the batch, or a buffer that draws from the process's generator.
    """
    weights = [loss.tensor_keys.priority_weight] if loss.use_prioritized_weights else []
    keys = {*weights, *loss._loss_mask_keys()}
    present = keys & set(buffers[0][:1].keys(True, True))
    reasons = [f"weights or masks ({', '.join(map(str, present))})"] if present else []
    reasons += [f"reduction={loss.reduction!r}"] if loss.reduction != "mean" else []
    if loss.value_regression == "gumbel":
        reasons += ["value_loss='gumbel', which is divided by the largest exponential of the whole batch"]
    if reasons:
        raise ValueError(f"several processes average plain means over their shares of a batch; got {reasons[0]}.")
    if any(buffer.storage._rng is None for buffer in buffers):
        raise ValueError("several processes must draw the same rows: give each buffer a random generator of its own.")


def _refuse_unsuited_sampler(buffer: ReplayBuffer) -> None:
    sampler, batch_size = buffer.sampler, buffer.batch_size or 1
    if not isinstance(sampler, RandomSampler | SamplerWithoutReplacement):
        raise ValueError(
            f"TrainingStep draws transitions uniformly; use a {type(sampler).__name__} with IQLLoss in your own loop."
        )
    if isinstance(sampler, SamplerWithoutReplacement) and not sampler.drop_last and len(buffer) % batch_size:
        raise ValueError(
            f"the last batch of a pass over {len(buffer)} transitions would be smaller than {batch_size}; build "
            "the SamplerWithoutReplacement with drop_last=True."
        )
