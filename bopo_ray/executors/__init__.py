"""How the embedded models are made: demonstrations of experts, augmented, cloned by small transformers from scratch."""
