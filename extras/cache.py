"""Keys and values that are not computed again (Fast-dLLM, arXiv 2505.22618): approximate, and several times as fast."""

import torch
import transformers


class KeyValueCache(transformers.DynamicCache):
    """Keep the keys and values of all columns of a canvas but those in a `window` (first column, last + 1).

    The first pass computes every column and fills the cache; later ones compute the window alone. That is an approximation:
    in a bidirectional model the keys of every column change with every token, and the kept ones do not.
    """

    def __init__(self, window):
        super().__init__()
        self.window = window

    def run(self, decoder, canvas, attention_mask, position_ids, read_at):
        """The decoder's last hidden states [B, n, H] at the columns `read_at`, which lie in the window after the first pass."""
        (first, last), columns = self.window, torch.arange(canvas.shape[1], device=canvas.device)
        # Attention does not mind the order of columns: those to be kept go first, where the cache can hold them.
        order, kept = torch.cat([columns[:first], columns[last:], columns[first:last]]), self.get_seq_length()
        new = order[kept:]
        padding = None if attention_mask is None else attention_mask[..., order]
        options = dict(attention_mask=padding, position_ids=position_ids[:, new], past_key_values=self, use_cache=True)
        states = decoder(canvas[:, new], **options).last_hidden_state
        self.crop(first - last)
        return states, order.argsort()[read_at] - kept
