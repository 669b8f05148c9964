"""Large models: weights divided among GPUs, what a run would cost, what a GPU measures."""
