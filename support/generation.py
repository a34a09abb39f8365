"""Text from a model: the KV cache, sampling from logits, and the loop over new tokens."""

import torch
from torch.nn import functional as F

from support import tokenizer
from support.devices import without_cudnn_attention
from support.distributed import Runtime
from support.errors import UserError


class KVCache:
    """Keys and values that one layer computed for the tokens so far, in memory allocated once."""

    def __init__(self, length: int):
        self.length, self.seen = length, 0  # tokens: capacity, and how many it holds
        self.memory = None

    def add(self, k, v):
        """Adds those of T new tokens, (B, nh, T, hs) each, and returns those of all tokens so far,
        (B, nh, seen, hs) each."""
        B, nh, T, hs = k.shape
        if self.memory is None:
            self.memory = k.new_empty(2, B, nh, self.length, hs)
        start, self.seen = self.seen, self.seen + T
        self.memory[0, :, :, start : self.seen] = k
        self.memory[1, :, :, start : self.seen] = v
        return self.memory[:, :, :, : self.seen].unbind()


def causal_mask(seen: int, T: int, device) -> torch.Tensor | None:
    """Which tokens each of T new tokens attends to, after `seen` cached ones: bool (T, seen + T).

    None if attention needs no mask: nothing is cached (plain causal attention), or T is 1.
    """
    if seen == 0 or T == 1:
        return None
    return torch.ones(T, seen + T, dtype=torch.bool, device=device).tril(seen)


def sample_ids(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One sampled id for each row of `logits` (B, V): int64 (B, 1).

    temperature: 0 takes the most likely id; top_k: sample among so many most likely ids
    top_p: sample among the most likely ids that together have this probability
    generator: a torch.Generator, or one for each row: then a row has the same ids in any batch
    """
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    ids = None
    if top_k is not None:  # in the order of ids: rounding of the logits must not reorder them
        ids = logits.topk(min(top_k, logits.size(1))).indices.sort(dim=1).values
        logits = logits.gather(1, ids)
    p = F.softmax(logits / temperature, dim=1)
    if top_p is not None:
        falling, order = p.sort(dim=1, descending=True)
        excluded = falling.cumsum(dim=1) - falling >= top_p
        p = p.masked_fill(excluded.scatter(1, order, excluded), 0.0)
    if isinstance(generator, list):
        rows = zip(p.split(1), generator, strict=True)
        chosen = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in rows])
    else:
        chosen = torch.multinomial(p, 1, generator=generator)
    return chosen if ids is None else ids.gather(1, chosen)


@torch.no_grad()
def stream(model, idx, max_new_tokens, stop=None, slide=1, **sampling):
    """Yields the ids that continue `idx` (B, T), one for each row at a time: int64 (B, 1).

    sampling: temperature, top_k, top_p, generator of `sample_ids`
    stop: an id, e.g. that of <|endoftext|>, after which a row repeats it; ends when all rows have
    slide: ids dropped from the start when the model's context (block_size) is full. With 1 the
        model sees as much as it can, but then each id costs a forward pass over the full context,
        since all positions shift.
    """
    size = model.config.block_size
    seen = new = idx[:, -size:]
    length = min(size, seen.size(1) + max_new_tokens)
    caches = [KVCache(length) for _ in model.transformer.h]
    stopped = torch.zeros_like(seen[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        with without_cudnn_attention():  # not around `yield`: it is for the calls here only
            x = model.hidden(new, caches=caches)[:, -1]
        logits = model.logits(x).float()
        if new is seen and not logits.isfinite().all():  # checked where a GPU has to be waited for
            raise UserError("the logits are not finite; train again with a lower --max_lr")
        new = sample_ids(logits, **sampling)
        if stop is not None:
            new = new.masked_fill(stopped, stop)
            stopped |= new == stop
        yield new
        if stop is not None and stopped.all():
            return
        seen = torch.cat((seen, new), dim=1)
        if seen.size(1) > size:
            seen = new = seen[:, slide:]
            for cache in caches:
                cache.seen = 0


def generate_texts(
    model, prompt: str, num: int, max_new_tokens: int, runtime: Runtime, check_signals
) -> list[str]:
    """`num` continuations of `prompt` (with it), shared by all ranks and the same for any number.

    Text i is sampled with top_k 50 and seed 42 + i. check_signals: called on all ranks before each
    """
    if model.config.vocab_size < tokenizer.VOCAB_SIZE:
        return [f"no sample: the model has {model.config.vocab_size:,} of GPT-2's tokens"]
    encoding = tokenizer.get_encoding()
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    texts = []
    for first in range(0, num, runtime.world_size):
        check_signals()
        i, text = first + runtime.rank, None
        if i < num:
            generator = torch.Generator(device=runtime.device).manual_seed(42 + i)
            idx = torch.tensor([ids], device=runtime.device)
            try:
                with runtime.autocast():
                    idx = model.generate(idx, max_new_tokens, top_k=50, generator=generator)
                text = encoding.decode(idx[0].tolist())
            except UserError as error:  # the next steps decide whether the run ends
                text = f"no sample: {error}"
        texts += runtime.all_gather(text)
    return texts[:num]
