"""How a policy samples and learns."""
