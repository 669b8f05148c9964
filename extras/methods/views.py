"""Other Views than wd1.py's: along the path that the sampler took, in pairs, shared by a group.

All are estimates of log p(o|q), and linear in log p, so that wd1.learn trains on them as they are.
"""

import torch
import torch.nn.functional as F

import wd1


def path_views(config, rollout, taken, steps):
    """Views of the path that the sampler took: the canvas x_t at each step t in the list `steps`.

    They score the tokens written at t, and are scaled up to all of the `taken` steps. With all of
    them the estimate is exact for the order in which the sample was written (arXiv 2510.04019), but
    for the share of the mask, which the sampler never proposes, in the softmax:

        sum_t sum_{i written at t} log p(o_i | q, x_t)

    taken: how many steps wrote something. A random few of them are an unbiased estimate."""
    written_at, prompt_length = rollout.written_at, rollout.prompt.shape[1]
    counted = wd1.until_eos(rollout.completion, config.eos_token_id) * taken / len(steps)
    return [
        wd1.View(
            F.pad(written_at >= step, (prompt_length, 0)),
            rollout.completion,
            counted * (written_at == step),
        )
        for step in steps
    ]


def complementary(views):
    """wd1.elbo_views' Views, each followed by that of its complement: 2 K Views of K.

    S and what it leaves of the completion are half of the estimate each, so a pair scores each
    token once, and the mean stays (arXiv 2506.20639). If S leaves nothing, S counts twice."""
    pairs = []
    for hidden, target, weight in views:
        left = hidden.shape[1] - target.shape[1]  # the prompt's columns
        subset, rest = weight != 0, ~hidden[:, left:]  # [B, L]; the completion ends after them
        each = weight.sum(1, keepdim=True)  # [B, 1]: L / K, whatever the subset's size
        size = rest.sum(1, keepdim=True)
        half = torch.where(size > 0, weight / 2, weight)
        pairs.append(wd1.View(hidden, target, half))
        rest_weight = rest * each / (2 * size.clamp(min=1))
        pairs.append(wd1.View(F.pad(~subset, (left, 0)), target, rest_weight))
    return pairs


def shared_noise(config, rollout):
    """A `uniform` for wd1's views, from columns to noise [B, columns]: with --shared_masks the same
    in each group, else of each row's own.

    wd1's weights sum to zero over a group; yet little noise cancels, and the gradient gets noisier
    (extras/measure/measured.md)."""
    group_size = config.num_generations if config.shared_masks else 1
    groups = len(rollout.prompt) // group_size

    def uniform(columns):
        noise = torch.rand(groups, columns, device=rollout.prompt.device)
        return noise.repeat_interleave(group_size, 0)

    return uniform


def draw_views(config, model_config, batch):
    """wd1.draw_views with more to choose from: trajectory, complementary and shared masks."""
    rollout = batch.rollout
    if config.likelihood == "trajectory":
        written = rollout.written_at[rollout.written_at < config.diffusion_steps]
        taken = int(written.max()) + 1
        steps = torch.randperm(taken)[: config.mc_samples].tolist()
        matters = (batch.w_plus != batch.w_minus)[:, None]  # see wd1.draw_views
        views = path_views(model_config, rollout, taken, steps)
        return [view._replace(weight=view.weight * matters) for view in views]
    noise = shared_noise(config, rollout)
    if config.complementary:
        half = config.model_copy(update=dict(mc_samples=config.mc_samples // 2))
        return complementary(wd1.draw_views(half, model_config, batch, uniform=noise))
    return wd1.draw_views(config, model_config, batch, uniform=noise)
