"""A judge whose scores are linear in the rows it is given, so that every gradient has a closed form."""

import torch

from learner.packing import pack, unpacked

ENDS = frozenset(range(5, 60))
"""So many that drawn responses have all lengths."""
HIDDEN = 12


class LinearJudge(torch.nn.Module):
    """Score t of a response is the sum over its tokens up to t of direction . embedding. With `strict`
    it reads responses of an odd number of tokens as other ones."""

    def __init__(self, vocabulary, level="sequence", strict=False, packing=True):
        super().__init__()
        self.end_ids = ENDS
        self.level = level
        self.vocabulary = vocabulary
        self.strict = strict
        self.packing = packing
        self.held = []
        torch.manual_seed(3)
        self.embedding = torch.nn.Parameter(torch.randn(vocabulary, HIDDEN))
        self.direction = torch.nn.Parameter(torch.randn(HIDDEN))

    def hold(self, version):
        self.held.append(version)

    def table(self):
        return self.embedding.detach()

    def prompt_of(self, prompt_text, response_ids, *, ended):
        odd = self.strict and len(response_ids) % 2 == 1
        return None if odd else [len(prompt_text), 1, 2]

    def batch(self, groups):
        if self.packing:
            (batch,) = pack(groups, pack_length=30, micro_batch_tokens=10**9)
        else:
            (batch,) = unpacked(groups, micro_batch_tokens=10**9)
        return batch

    def scores(self, batch, embedded):
        earlier = (batch.trajectory[:, None] == batch.trajectory) & (batch.flat[:, None] >= batch.flat)
        return earlier.float() @ (embedded @ self.direction.detach())

    def token_scores(self):
        """Score of each token of the vocabulary, [V]."""
        return (self.embedding @ self.direction).detach()
