"""Networks: the decoder of the Llama kind."""
