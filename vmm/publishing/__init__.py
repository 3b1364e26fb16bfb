"""What a published folder holds beside its weights: the card, its numbers, its example, and the check of them all."""
