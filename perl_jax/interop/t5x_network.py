"""T5X's own network as NETWORK, not a line of it edited: behind the calls of models/t5.py, with LoRA by intercept.py.

    --gin_file=t5x/examples/t5/t5_1_1/base.gin --gin_file=RECIPE --gin_file=models/t5x_network.gin

Parameters and their paths are T5X's own, `layers_0`, `layers_1`, ... Its cache is not used: each token that is drawn
reads all tokens before it again, so that sampling is slower than with models/t5.py, which computes the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import core, struct
from flax import linen as nn
from flax.linen import partitioning

from perl_jax.interop import t5x
from perl_jax.models import intercept
from perl_jax.types import Variables


def network(module: Any) -> T5XNetwork:
    """For gin: `module` is `network.Transformer` of t5x.examples.t5.

    Raises:
      UserError: another network, or one with dropout.
    """
    t5x.check(module)
    return T5XNetwork(module)


class Cache(struct.PyTreeNode):
    """The inputs that responses are decoded from.

    Attributes:
      encoded: encoded prompts, [B K, P, D].
      prompts: int [B K, P], their tokens.
      tokens: int [B, K, 1 + R], those of the responses.
    """

    encoded: jax.Array
    prompts: jax.Array
    tokens: jax.Array


class T5XNetwork(nn.Module):
    """A network of T5X as a Network (models/network.py).

    Attributes:
      module: an encoder-decoder with T5X's `encode` and `decode`, whose last norm is called decoder_norm.
    """

    module: Any

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    @property
    def config(self) -> Any:
        """T5X's own."""
        return self.module.config

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Variables:
        """The parameters in boxes with the axis names that T5X gives them in a collection of its own."""
        variables = super().init(rngs, *args, **kwargs)
        axes = core.unfreeze(partitioning.get_axis_names(variables['params_axes']))
        box = lambda x, names: nn.LogicallyPartitioned(x, tuple(names))  # noqa: E731
        return {'params': jax.tree.map(box, variables['params'], axes)}

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.apply` under `lora.bind(base, adapter)`."""
        return intercept.apply(super().apply, variables, *args, **kwargs)

    def __call__(
        self, inputs: jax.Array, inputs_mask: jax.Array, targets: jax.Array, ends: jax.Array | None = None
    ) -> jax.Array:
        """`Network.__call__`; a prompt's token 0 is padding to T5X."""
        tokens = jnp.pad(targets, ((0, 0), (0, 0), (1, 0)))
        hidden = self._decoded(*self._encoded(inputs, inputs_mask, targets.shape[1]), tokens)
        if ends is not None:
            return jnp.take_along_axis(hidden, ends[..., None, None], axis=2)[:, :, 0]
        return hidden

    def prefill(self, inputs: jax.Array, inputs_mask: jax.Array, K: int, R: int) -> tuple[jax.Array, Cache]:
        """Read the prompts and the start token: `Network.prefill`."""
        encoded, prompts = self._encoded(inputs, inputs_mask, K)
        tokens = jnp.zeros((len(inputs), K, 1 + R), jnp.int32)
        return self._decoded(encoded, prompts, tokens[..., :1])[:, 0, 0], Cache(encoded, prompts, tokens)

    def decode(self, tokens: jax.Array, step: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read one more token of every response: `Network.decode`. T5X's network reads those before again."""
        tokens_so_far = jax.lax.dynamic_update_slice_in_dim(cache.tokens, tokens[..., None], step + 1, axis=2)
        hidden = self._decoded(cache.encoded, cache.prompts, tokens_so_far)
        last_hidden = jax.lax.dynamic_index_in_dim(hidden, step + 1, axis=2, keepdims=False)
        return last_hidden, cache.replace(tokens=tokens_so_far)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute the logits of hidden states: `Network.logits`."""
        params, hidden = self.variables['params'], hidden.astype(jnp.float32)
        if not self.config.logits_via_embedding:
            return hidden @ params['decoder']['logits_dense']['kernel'].astype(jnp.float32)
        return hidden @ params['token_embedder']['embedding'].astype(jnp.float32).T * hidden.shape[-1] ** -0.5

    def _encoded(self, inputs: jax.Array, inputs_mask: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
        prompts = jnp.where(inputs_mask, inputs, 0)
        encoded = self.module.encode(prompts, enable_dropout=False)
        return jnp.repeat(encoded, K, axis=0), jnp.repeat(prompts, K, axis=0)

    def _decoded(self, encoded: jax.Array, prompts: jax.Array, tokens: jax.Array) -> jax.Array:
        """The states [B, K, T, D] that T5X makes its logits of, which are left out where nobody asks for them."""
        states, flat = [], tokens.reshape(-1, tokens.shape[-1])

        def look(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            y = call(*args, **kwargs)
            if context.module.name == 'decoder_norm' and context.method_name == '__call__':
                states.append(y)
            return y

        with nn.intercept_methods(look):  # ones: all tokens may be looked at, and what follows one never is
            self.module.decode(encoded, prompts, flat, jnp.ones_like(flat), enable_dropout=False)
        return states[-1].reshape(*tokens.shape, -1)
