"""Networks: the decoder of the Llama kind, and T5."""
