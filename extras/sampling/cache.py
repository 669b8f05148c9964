"""Keys and values that are not computed again (Fast-dLLM, arXiv 2505.22618): approximate, fast."""

import torch
import torch.nn.functional as F
import transformers

from rewards import InputError


class CachedPolicy:
    """A policy for one call of wd1.generate that keeps keys and values of what is not written now.

    "prefix" keeps those left of the current block, "dual" those right of it as well. In each block
    the first pass computes every column; later ones compute the others alone. This is approximate:
    in a bidirectional model every column's keys change with every token, and those kept do not.
    wd1 does not correct for it, nor for what else the sampler does differently from the policy that
    is trained (wd1.py, section 5). Raises InputError for another kind."""

    def __init__(self, kind):
        if kind not in ("prefix", "dual"):
            raise InputError(f"cache {kind!r}: must be prefix or dual")
        self.kind, self.kept = kind, None

    def __call__(self, model, canvas, attention_mask, positions):
        width, columns = canvas.shape[1], torch.arange(canvas.shape[1], device=canvas.device)
        shift = int(model.config.logit_shift)
        first = max(int(positions[0]) - shift, 0)  # where it is predicted
        last = width if self.kind == "prefix" else int(positions[-1]) + 1
        # Attention does not mind the order of columns: those to be kept go first.
        order = torch.cat([columns[:first], columns[last:], columns[first:last]])
        kept = canvas[:, order[: first - last]]
        # In another block, or with other rows, what is kept would be other text.
        if self.kept is None or not torch.equal(kept, self.kept):
            self.kept, self.cache = kept, transformers.DynamicCache()
        start = self.cache.get_seq_length()
        new = order[start:]
        position_ids, visible = columns[None], None
        if attention_mask is not None and not attention_mask.all():  # as in wd1.hidden_states
            real = F.pad(attention_mask.bool(), (0, width - attention_mask.shape[1]), value=True)
            position_ids = (real.cumsum(-1) - 1).clamp(min=0)
            visible = real[:, None, None, order]
        options = dict(past_key_values=self.cache, use_cache=True)
        decoder = model.get_decoder()
        output = decoder(canvas[:, new], visible, position_ids[:, new], **options)
        self.cache.crop(first - last)
        read_at = (positions - shift).clamp(min=0)
        states = output.last_hidden_state[:, order.argsort()[read_at] - start]
        return model.get_output_embeddings()(states).float()
