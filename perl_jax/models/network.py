"""What samplers, losses and rewards ask of a network; the frozen base and the adapter are arguments of each call.

    net.apply(variables, inputs, inputs_mask, targets)                   # variables = bind(base, adapter)
    net.apply(variables, inputs, inputs_mask, K, R, method='prefill')
    net.apply(variables, tokens, step, cache, method='decode')
    net.apply(variables, hidden, method='logits')
"""

from __future__ import annotations

from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int, PyTree

from perl_jax.types import AnyArray


class Network(Protocol):
    """A linen module with these methods: Decoder, T5, or one of your own.

    Attributes:
      config: has at least `emb_dim` (D) and `vocab_size` (V).
    """

    config: Any

    def __call__(
        self,
        inputs: Int[AnyArray, 'B P'],
        inputs_mask: Bool[AnyArray, 'B P'],
        targets: Int[AnyArray, 'B K R'],
        ends: Int[AnyArray, 'B K'] | None = None,
    ) -> Float[Array, 'B K R+1 D'] | Float[Array, 'B K D']:
        """Read prompts and all their responses at once.

        Args:
          inputs: int [B, P], the prompts, padded on the right.
          inputs_mask: bool [B, P], true at their tokens.
          targets: int [B, K, R], the responses, padded on the right.
          ends: int [B, K], tokens that each response has read, where only one state of each is needed.

        Returns:
          hidden [B, K, R + 1, D]: `hidden[..., :-1, :]` predicts each response token, `hidden[..., 1:, :]` has read it.
          With `ends`, only hidden[b, k, ends[b, k]], [B, K, D].
        """
        ...

    def logits(self, hidden: Float[Array, '*batch D']) -> Float[Array, '*batch V']:
        """Compute the logits of hidden states.

        Args:
          hidden: [..., D], in the network's dtype.

        Returns:
          float32 [..., V].
        """
        ...

    def prefill(
        self, inputs: Int[AnyArray, 'B P'], inputs_mask: Bool[AnyArray, 'B P'], K: int, R: int
    ) -> tuple[Float[Array, 'B D'], PyTree]:
        """Read the prompts once, and allocate the cache of their responses.

        Args:
          inputs: int [B, P].
          inputs_mask: bool [B, P].
          K: responses to each prompt.
          R: the most tokens of a response.

        Returns:
          The hidden state that predicts the first token, [B, D], and the cache.
        """
        ...

    def decode(
        self, tokens: Int[Array, 'B K'], step: Int[Array, ''], cache: Any
    ) -> tuple[Float[Array, 'B K D'], PyTree]:
        """Read one more token of every response.

        Args:
          tokens: int [B, K].
          step: int [], their index in the response, the same for all.
          cache: of the prompts and the previous tokens.

        Returns:
          hidden [B, K, D], and the cache with these tokens in it.
        """
        ...
