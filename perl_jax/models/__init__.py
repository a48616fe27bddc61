"""What is computed: LoRA, the layers that take it, two networks, what is read off their states."""
